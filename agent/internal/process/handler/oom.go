package handler

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"emberbox/agent/internal/reaper"
)

// startedScore is the OOM score of what emberd starts: when memory runs out, it
// goes before emberd. Raising a score needs no privilege.
const startedScore = 200

// oomScore starts processes with a score of their own. A child inherits its
// parent's, and may fork before the parent could write the child's; so emberd
// takes the score itself while it forks, and puts its own back.
type oomScore struct {
	mu   sync.Mutex
	file *os.File // nil: scores cannot be set here
	own  string
}

func newOOMScore() *oomScore {
	const path = "/proc/self/oom_score_adj"
	text, err := os.ReadFile(path)
	if err != nil {
		return &oomScore{}
	}
	own := strings.TrimSpace(string(text))
	if n, err := strconv.Atoi(own); err != nil || n >= startedScore {
		return &oomScore{}
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return &oomScore{}
	}
	return &oomScore{file: file, own: own}
}

// fork is reaper.Fork with the score set. Forks are one at a time in any case
// (syscall.ForkLock), so that the lock costs nothing.
func (s *oomScore) fork(r *reaper.Reaper, path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	if s.file == nil {
		return r.Fork(path, argv, attr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.file.WriteString(strconv.Itoa(startedScore)); err == nil {
		defer func() { _, _ = s.file.WriteString(s.own) }()
	}
	return r.Fork(path, argv, attr)
}
