package host

import (
	"os"
	"testing"
)

func TestCollapseCounts(t *testing.T) {
	r, err := Collapse()
	if err != nil {
		t.Fatal(err)
	}
	if r.Regions == 0 || r.Chunks != r.Collapsed+r.AlreadyHuge+r.Skipped {
		t.Errorf("%+v", r)
	}
}

func TestRelaxMonitorChangesOneThread(t *testing.T) {
	RelaxMonitor()

	late := 0
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if slack, err := os.ReadFile("/proc/" + entry.Name() + "/timerslack_ns"); err == nil && string(slack) == "4000000\n" {
			late++
		}
	}
	if late != 1 {
		t.Errorf("%d threads of %d have late timers", late, len(entries))
	}
}
