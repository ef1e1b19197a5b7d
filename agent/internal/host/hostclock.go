package host

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kvmClockName = "KVM virtual PTP"
	// clockReadings is how often the two clocks are compared; the quickest look counts.
	clockReadings = 3
	// clockExact is what a clock may be off by without being touched.
	clockExact = time.Millisecond
	// clockDrift is the most that is taken for drift. A clock that is farther
	// off was set by somebody inside, who may want it so.
	clockDrift = 500 * time.Millisecond
	// clockWatch is how often drift is looked for: it stops an idle machine's sleep.
	clockWatch = time.Minute
)

// HostClock is the clock of the host under a microVM, which KVM lets its
// guests read: right to some microseconds however long a message from the node
// takes, and at once after a restore. A nil one is no such clock.
type HostClock struct {
	id int32
	// setting keeps a correction from being made that was measured before the clock was set.
	setting sync.Mutex
}

// OpenHostClock returns nil where the kernel has none: it is no guest of KVM,
// it lacks the driver, or its host's clock does not count processor cycles.
func OpenHostClock() *HostClock {
	devices, _ := filepath.Glob("/sys/class/ptp/ptp*")
	for _, device := range devices {
		name, err := os.ReadFile(filepath.Clean(device + "/clock_name"))
		if err != nil || strings.TrimSpace(string(name)) != kvmClockName {
			continue
		}
		fd, err := unix.Open("/dev/"+filepath.Base(device), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return &HostClock{id: int32(^fd)<<3 | 3} // how the kernel names a clock by its descriptor
		}
	}
	return nil
}

// Set sets the wall clock to the host's, and to what the node told where the
// host's cannot be read.
func (c *HostClock) Set(told time.Time) error {
	if c != nil && c.follow() == nil {
		return nil
	}
	return SetClock(told)
}

// follow sets the wall clock to the host's.
func (c *HostClock) follow() error {
	c.setting.Lock()
	defer c.setting.Unlock()
	// First: a correction under way would go on after the clock is right.
	if err := slew(0); err != nil {
		return err
	}
	off, err := c.offset()
	if err != nil || off.Abs() < clockExact {
		return err
	}
	return step(off)
}

// Keep corrects what the wall clock drifts by until ctx ends, so slowly that
// no program sees it go back.
func (c *HostClock) Keep(ctx context.Context) {
	ticks := time.NewTicker(clockWatch)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
			c.correct()
		}
	}
}

func (c *HostClock) correct() {
	c.setting.Lock()
	defer c.setting.Unlock()
	if off, err := c.offset(); err == nil && off.Abs() >= clockExact && off.Abs() <= clockDrift {
		_ = slew(off) // looked at again in a minute
	}
}

// offset says how far the host's clock is ahead.
func (c *HostClock) offset() (time.Duration, error) {
	return offsetOf(
		func() (int64, error) { return nanoseconds(unix.CLOCK_REALTIME) },
		func() (int64, error) { return nanoseconds(c.id) },
	)
}

// offsetOf compares two clocks, in nanoseconds. The looks at ours before and
// after bound the error: a restored machine's first one takes milliseconds.
func offsetOf(ours, theirs func() (int64, error)) (time.Duration, error) {
	var off, narrowest int64
	for i := range clockReadings {
		before, err := ours()
		if err != nil {
			return 0, err
		}
		there, err := theirs()
		if err != nil {
			return 0, err
		}
		after, err := ours()
		if err != nil {
			return 0, err
		}
		if width := after - before; i == 0 || width < narrowest {
			off, narrowest = there-before-width/2, width
		}
	}
	return time.Duration(off), nil
}

func nanoseconds(clock int32) (int64, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(clock, &ts)
	return ts.Nano(), err
}

// step moves the wall clock at once.
func step(off time.Duration) error {
	micros := off.Microseconds()
	seconds := micros / 1_000_000
	if micros%1_000_000 < 0 {
		seconds-- // the kernel wants the rest positive
	}
	change := unix.Timex{Modes: unix.ADJ_SETOFFSET}
	change.Time.Sec, change.Time.Usec = seconds, micros-seconds*1_000_000
	_, err := unix.Adjtimex(&change)
	return err
}

// slew lets the wall clock run a little faster or slower until it has made up
// for off. It replaces what was left of the last one.
func slew(off time.Duration) error {
	_, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: off.Microseconds()})
	return err
}
