// Package reaper owns every wait() of the program. As PID 1 emberd inherits
// orphans and must reap them; a second waiter would steal the exit status of
// emberd's own children. So children are started and awaited here only.
package reaper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/host"
)

// Reaper reaps children and hands each owner its exit status.
type Reaper struct {
	// starting is held for reading while a child is being started and for
	// writing while the dead are collected, so that no child can be collected
	// before its owner is known.
	starting sync.RWMutex

	mu    sync.Mutex
	owned map[int]chan syscall.WaitStatus

	forked chan struct{}
}

// Start begins reaping. Orphans of this process's descendants come here too,
// also when it is not PID 1.
func Start() *Reaper {
	r := &Reaper{owned: map[int]chan syscall.WaitStatus{}, forked: make(chan struct{}, 1)}
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	go func() {
		for range died {
			r.collect()
		}
	}()
	return r
}

// Fork starts a program and returns its pid and where its status will arrive, once.
func (r *Reaper) Fork(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	r.starting.RLock()
	defer r.starting.RUnlock()
	runtime.LockOSThread()
	host.OrdinaryTimers()
	pid, err := syscall.ForkExec(path, argv, attr)
	runtime.UnlockOSThread()
	if err != nil {
		return 0, nil, err
	}
	exit := make(chan syscall.WaitStatus, 1)
	r.mu.Lock()
	r.owned[pid] = exit
	r.mu.Unlock()
	select {
	case r.forked <- struct{}{}:
	default: // nobody has looked since the last one
	}
	return pid, exit, nil
}

// Forked receives after a program was started; many at once may be one.
func (r *Reaper) Forked() <-chan struct{} { return r.forked }

// Alone says that no other program is in the machine, orphans included.
func (r *Reaper) Alone() bool {
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return errors.Is(err, unix.ECHILD)
}

// Kill signals a child (negative: its group) only while its pid is certainly
// still its own, that is, before it was reaped.
func (r *Reaper) Kill(pid int, group bool, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, alive := r.owned[pid]; !alive {
		return syscall.ESRCH
	}
	if group {
		return syscall.Kill(-pid, sig)
	}
	return syscall.Kill(pid, sig)
}

func (r *Reaper) collect() {
	r.starting.Lock()
	defer r.starting.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if exit, ok := r.owned[pid]; ok && (status.Exited() || status.Signaled()) {
			delete(r.owned, pid)
			exit <- status
		}
	}
}

// Run runs a program of the machine as root and returns what it printed. The
// context's end kills it.
func (r *Reaper) Run(ctx context.Context, argv ...string) (string, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/"} {
			if _, statErr := os.Stat(dir + argv[0]); statErr == nil {
				path, err = dir+argv[0], nil
				break
			}
		}
		if err != nil {
			return "", err
		}
	}
	out, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer func() { _ = out.Close() }()
	null, err := os.Open(os.DevNull)
	if err != nil {
		_ = in.Close()
		return "", err
	}
	pid, exit, err := r.Fork(path, argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{null.Fd(), in.Fd(), in.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	_ = in.Close()
	_ = null.Close()
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, func() { _ = r.Kill(pid, true, syscall.SIGKILL) })()
	text, _ := io.ReadAll(io.LimitReader(out, 64<<10))
	status := <-exit
	switch {
	case ctx.Err() != nil:
		return string(text), ctx.Err()
	case status.Signaled():
		return string(text), fmt.Errorf("signal: %s", status.Signal())
	case status.ExitStatus() != 0:
		return string(text), fmt.Errorf("exit status %d", status.ExitStatus())
	}
	return string(text), nil
}
