package handler

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/cgroup"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/paths"
	"emberbox/agent/internal/reaper"
	"emberbox/agent/internal/sandbox"
)

// remembered is how long an ended process can still be connected to.
const remembered = 30 * time.Second

// Errors of Start, by what the caller did wrong.
var (
	ErrBadCwd   = errors.New("bad cwd")
	ErrBadStart = errors.New("cannot start")
)

// Table holds the processes that run and those that ended just now.
type Table struct {
	state  *sandbox.State
	reaper *reaper.Reaper
	log    *logs.Log
	groups *cgroup.Manager
	score  *oomScore

	mu      sync.Mutex
	running map[uint32]*Process
	recent  map[uint32]*Process
}

// NewTable returns an empty table; groups may be nil.
func NewTable(state *sandbox.State, r *reaper.Reaper, log *logs.Log, groups *cgroup.Manager) *Table {
	return &Table{state: state, reaper: r, log: log, groups: groups, score: newOOMScore(), running: map[uint32]*Process{}, recent: map[uint32]*Process{}}
}

// Start starts a program as its user and subscribes to its output from the first byte.
//
// Errors: ErrBadCwd, ErrBadStart (both wrapped with what was asked), or the kernel's.
func (t *Table) Start(spec Spec) (*Process, *Subscription, error) {
	u := spec.User
	cwd, err := paths.Resolve(spec.Config.GetCwd(), u.Home, t.state.DefaultWorkdir())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrBadCwd, err)
	}
	env := environ(t.state, u, spec.Config.GetEnvs())
	var path string
	var fs *files
	err = asuser.Do(u, func() (err error) {
		if err := checkCwd(cwd); err != nil {
			return fmt.Errorf("%w: %w", ErrBadCwd, err)
		}
		if path, err = lookPath(spec.Config.GetCmd(), cwd, env); err != nil {
			return fmt.Errorf("%w: %w", ErrBadStart, err)
		}
		if spec.PTY != nil {
			fs, err = openTerminal(spec.PTY.GetSize())
		} else {
			fs, err = openPipes(spec.Stdin)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	argv := append([]string{spec.Config.GetCmd()}, spec.Config.GetArgs()...)
	attr := &syscall.ProcAttr{
		Dir: cwd, Env: env, Files: fs.child[:],
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: spec.PTY != nil},
	}
	if os.Geteuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	if fd, ok := t.groups.For(spec.PTY != nil); ok {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	}
	pid, exit, err := t.score.fork(t.reaper, path, argv, attr)
	fs.shutChild()
	if err != nil {
		fs.shutAll()
		return nil, nil, fmt.Errorf("%w: %w", ErrBadStart, err)
	}
	p := &Process{
		PID: uint32(pid), Config: spec.Config, Tag: spec.Tag, t: t, cast: newBroadcast(),
		in:   &input{isPTY: spec.PTY != nil, file: fs.in},
		done: make(chan struct{}), timedOut: make(chan struct{}),
	}
	if spec.PTY != nil {
		p.pty = fs.in
	}
	sub := p.Subscribe()
	t.mu.Lock()
	t.running[p.PID] = p
	delete(t.recent, p.PID)
	t.mu.Unlock()
	t.note("started", "pid", p.pid(), "user", u.Name, "cmd", command(spec.Config), "cwd", cwd)
	var kill *time.Timer
	if spec.Timeout > 0 {
		kill = time.AfterFunc(spec.Timeout, func() {
			close(p.timedOut)
			_ = p.Signal(syscall.SIGKILL)
		})
	}
	go p.wait(exit, fs.out, kill)
	return p, sub, nil
}

// note logs a process; what the node runs to make a machine ready is of no interest to its sandbox.
func (t *Table) note(message string, kv ...string) {
	if t.state.Claimed() {
		t.log.Info("process", message, kv...)
	} else {
		t.log.Debug("process", message, kv...)
	}
}

func openTerminal(size *pb.PTY_Size) (*files, error) {
	master, terminal, err := openPTY(size)
	if err != nil {
		return nil, err
	}
	file := ours(master, "pty")
	return &files{
		child:  [3]uintptr{uintptr(terminal), uintptr(terminal), uintptr(terminal)},
		toShut: []int{terminal},
		in:     file,
		out:    []source{{file, asPTY, "pty"}},
	}, nil
}

// checkCwd gives the one failure of a start that users make most often words
// of its own; the fork decides again.
func checkCwd(cwd string) error {
	info, err := os.Stat(cwd)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("cwd '%s' does not exist", cwd)
	case err != nil:
		return fmt.Errorf("cwd '%s': %w", cwd, errors.Unwrap(err))
	case !info.IsDir():
		return fmt.Errorf("cwd '%s' is not a directory", cwd)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, cwd, unix.X_OK, unix.AT_EACCESS); errors.Is(err, unix.EACCES) {
		return fmt.Errorf("cwd '%s': %w", cwd, err)
	}
	return nil
}

func command(c *pb.ProcessConfig) string {
	text := c.GetCmd()
	for _, a := range c.GetArgs() {
		if len(text) > 1024 {
			break
		}
		text += " " + a
	}
	return text
}

// ended moves p from the running to the recent.
func (t *Table) ended(p *Process) {
	t.mu.Lock()
	if t.running[p.PID] == p {
		delete(t.running, p.PID)
	}
	t.recent[p.PID] = p
	t.mu.Unlock()
	time.AfterFunc(remembered, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.recent[p.PID] == p {
			delete(t.recent, p.PID)
		}
	})
	t.note("ended", "pid", p.pid(), "status", p.end.GetStatus(),
		"exit_code", strconv.Itoa(int(p.end.GetExitCode())))
}

// Running lists the running processes by pid.
func (t *Table) Running() []*Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*Process, 0, len(t.running))
	for _, p := range t.running {
		list = append(list, p)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].PID < list[j].PID })
	return list
}

// Find returns the running process that the selector names, or nil.
func (t *Table) Find(s *pb.ProcessSelector) *Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return find(t.running, s)
}

// FindRecent is Find, and looks among the ended ones when none runs.
func (t *Table) FindRecent(s *pb.ProcessSelector) *Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := find(t.running, s); p != nil {
		return p
	}
	return find(t.recent, s)
}

func find(in map[uint32]*Process, s *pb.ProcessSelector) *Process {
	switch by := s.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		return in[by.Pid]
	case *pb.ProcessSelector_Tag:
		var newest *Process
		for _, p := range in {
			if p.Tag != nil && *p.Tag == by.Tag && (newest == nil || p.PID > newest.PID) {
				newest = p
			}
		}
		return newest
	}
	return nil
}

// killSession kills every process of a session. Each is held by a pidfd while
// its session is read, so that a reused pid is never hit.
func killSession(session int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if sid, err := unix.Getsid(pid); err == nil && sid == session {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		_ = unix.Close(fd)
	}
}
