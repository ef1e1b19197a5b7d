package host

import (
	"errors"
	"testing"
	"time"
)

// clockAt answers with one reading after the other.
func clockAt(readings ...int64) func() (int64, error) {
	return func() (int64, error) {
		if len(readings) == 0 {
			return 0, errors.New("read too often")
		}
		next := readings[0]
		readings = readings[1:]
		return next, nil
	}
}

func TestTheQuickestLookAtTheHostsClockCounts(t *testing.T) {
	ours := clockAt(0, 9_000, 10_000, 10_200, 20_000, 28_000)
	theirs := clockAt(104_000, 110_100, 127_000)

	off, err := offsetOf(ours, theirs)

	if err != nil || off != 100_000*time.Nanosecond {
		t.Errorf("%v, %v", off, err)
	}
}

func TestAClockThatCannotBeReadIsAnError(t *testing.T) {
	broken := func() (int64, error) { return 0, errors.New("gone") }

	if _, err := offsetOf(clockAt(1, 2), broken); err == nil {
		t.Error("no error")
	}
	if _, err := offsetOf(broken, clockAt(1, 2)); err == nil {
		t.Error("no error")
	}
}

func TestWithoutAHostsClockTheNodesWordCounts(t *testing.T) {
	var none *HostClock

	if err := none.Set(time.Now()); err != nil { // within the tolerance: nothing is set
		t.Error(err)
	}
}
