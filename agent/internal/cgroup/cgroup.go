// Package cgroup keeps what clients started in cgroups of its own, so that a
// machine can be brought to rest before its memory is saved. Only a machine
// with a kernel and a cgroup v2 tree of its own has one; in a container the
// node's freezer does this from outside.
package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Manager owns the cgroups `user` and `pty` below a cgroup v2 root. A nil
// Manager manages nothing.
type Manager struct {
	user, pty *os.File
}

// New makes the cgroups below root, a mounted cgroup v2 tree.
func New(root string) (*Manager, error) {
	m := &Manager{}
	for name, into := range map[string]**os.File{"user": &m.user, "pty": &m.pty} {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		file, err := os.Open(dir)
		if err != nil {
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		*into = file
	}
	return m, nil
}

// For returns the descriptor of the cgroup a new process starts in, for
// clone3, and whether there is one.
func (m *Manager) For(pty bool) (int, bool) {
	switch {
	case m == nil:
		return -1, false
	case pty:
		return int(m.pty.Fd()), true
	}
	return int(m.user.Fd()), true
}

// Result is what a freeze observed, in the words of the agent's OpenAPI page.
type Result struct {
	Requested    int   `json:"requested"`
	Frozen       int   `json:"frozen"`
	NotFrozen    int   `json:"notFrozen"`
	Failed       int   `json:"failed"`
	Unobservable int   `json:"unobservable"`
	SweepMs      int64 `json:"sweepMs"`
	WaitMs       int64 `json:"waitMs"`
}

// Freeze asks every cgroup to stop and waits up to patience until they have.
func (m *Manager) Freeze(patience time.Duration) Result {
	var r Result
	if m == nil {
		return r
	}
	began := time.Now()
	waiting := map[string]bool{}
	for _, dir := range m.dirs() {
		if err := write(dir, "1"); err != nil {
			r.Failed++
			continue
		}
		r.Requested++
		waiting[dir] = true
	}
	swept := time.Now()
	r.SweepMs = swept.Sub(began).Milliseconds()
	for patience > 0 {
		for dir := range waiting {
			frozen, err := isFrozen(dir)
			switch {
			case err != nil:
				r.Failed++
				delete(waiting, dir)
			case frozen:
				r.Frozen++
				delete(waiting, dir)
			}
		}
		if len(waiting) == 0 || time.Since(swept) >= patience {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.NotFrozen = len(waiting)
	r.WaitMs = time.Since(swept).Milliseconds()
	return r
}

// Unfreeze lets everything go on. It is idempotent.
func (m *Manager) Unfreeze() error {
	if m == nil {
		return nil
	}
	for _, dir := range m.dirs() {
		if err := write(dir, "0"); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("unfreeze: %w", err)
		}
	}
	return nil
}

func (m *Manager) dirs() []string { return []string{m.user.Name(), m.pty.Name()} }

func write(dir, value string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte(value), 0)
}

func isFrozen(dir string) (bool, error) {
	events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	return strings.Contains(string(events), "frozen 1"), err
}
