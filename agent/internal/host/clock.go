// Package host changes the machine around the agent: its clock, entropy,
// names and trust store. Everything is idempotent, and what an unprivileged
// container may not do (clock, entropy, host name) is left to its host.
package host

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// clockTolerance is how far the clock may be off before it is set: setting it
// makes time jump for every program inside.
const clockTolerance = 50 * time.Millisecond

// SetClock sets the wall clock to now when it is off by more than the tolerance.
func SetClock(now time.Time) error {
	off := time.Since(now)
	if off.Abs() <= clockTolerance {
		return nil
	}
	ts := unix.NsecToTimespec(now.UnixNano())
	return allowed(unix.ClockSettime(unix.CLOCK_REALTIME, &ts))
}

// allowed drops the error of a privilege that this machine does not have.
func allowed(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}
