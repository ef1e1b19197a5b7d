// Package handler holds the processes that clients started: their life, their
// output, their input. The RPC files beside it only translate.
package handler

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/users"
)

const (
	chunk = 32 << 10
	// lingering is how long a finished process's stream waits for background
	// children that still hold its output. A shell's `server &` would hold it
	// for ever; after this the end event is sent and the output is drained to
	// nowhere, so that the child is not killed by a closed pipe.
	lingering = time.Second
)

// Spec is what a client asked to start.
type Spec struct {
	User    *users.User
	Config  *pb.ProcessConfig
	PTY     *pb.PTY // nil: pipes
	Tag     *string
	Stdin   bool
	Timeout time.Duration // kills the process; 0 for none
}

// Process is one started program.
type Process struct {
	PID    uint32
	Config *pb.ProcessConfig
	Tag    *string

	t    *Table
	cast *broadcast
	in   *input
	pty  *os.File // master, nil for pipes

	done     chan struct{} // closed when end is set
	end      *pb.ProcessEvent_EndEvent
	timedOut chan struct{}
}

// Subscribe returns the process's output from now on.
func (p *Process) Subscribe() *Subscription { return p.cast.subscribe() }

// Done is closed when the process has ended and End is known.
func (p *Process) Done() <-chan struct{} { return p.done }

// End is how the process ended; nil before Done.
func (p *Process) End() *pb.ProcessEvent_EndEvent {
	select {
	case <-p.done:
		return p.end
	default:
		return nil
	}
}

// TimedOut is closed when the process was killed for running too long.
func (p *Process) TimedOut() <-chan struct{} { return p.timedOut }

// IsPTY says whether the process has a terminal.
func (p *Process) IsPTY() bool { return p.pty != nil }

// Resize sets the size of the process's terminal.
func (p *Process) Resize(size *pb.PTY_Size) error {
	raw, err := p.pty.SyscallConn()
	if err != nil {
		return err
	}
	var resizeErr error
	if err := raw.Control(func(fd uintptr) { resizeErr = resize(int(fd), size) }); err != nil {
		return err
	}
	return resizeErr
}

// Signal signals the process's group, as a shell user's Ctrl+C or kill would
// reach the whole job. SIGKILL takes the whole session: the jobs of an
// interactive shell have groups of their own.
//
// Errors: syscall.ESRCH when it ended already.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.t.reaper.Kill(int(p.PID), true, sig); err != nil {
		return err
	}
	if sig == syscall.SIGKILL {
		// The number cannot belong to anyone else while a member of the session lives.
		killSession(int(p.PID))
	}
	return nil
}

// Write gives data to the process's stdin, or its terminal.
func (p *Process) Write(ctx context.Context, data []byte) error { return p.in.write(ctx, data) }

// CloseStdin ends the process's stdin.
func (p *Process) CloseStdin() error { return p.in.close() }

// files are the three descriptors of the child and the parent's ends.
type files struct {
	child  [3]uintptr
	toShut []int // the child's ends, closed after the fork
	in     *os.File
	out    []source
}

type source struct {
	file *os.File
	wrap func([]byte) *pb.ProcessEvent_DataEvent
	name string
}

func asStdout(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: b}}
}

func asStderr(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stderr{Stderr: b}}
}

func asPTY(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Pty{Pty: b}}
}

func (f *files) shutChild() {
	for _, fd := range f.toShut {
		_ = unix.Close(fd)
	}
	f.toShut = nil
}

func (f *files) shutAll() {
	f.shutChild()
	if f.in != nil {
		_ = f.in.Close()
	}
	for _, s := range f.out {
		_ = s.file.Close()
	}
}

// ours makes a descriptor of ours one that the runtime's poller serves.
func ours(fd int, name string) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), name)
}

func openPipes(withStdin bool) (*files, error) {
	f := &files{}
	pair := func() (r, w int, err error) {
		var p [2]int
		err = unix.Pipe2(p[:], unix.O_CLOEXEC)
		return p[0], p[1], err
	}
	if withStdin {
		r, w, err := pair()
		if err != nil {
			return nil, err
		}
		f.child[0] = uintptr(r)
		f.toShut = append(f.toShut, r)
		f.in = ours(w, "stdin")
	} else {
		null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open /dev/null: %w", err)
		}
		f.child[0] = uintptr(null)
		f.toShut = append(f.toShut, null)
	}
	for i, wrap := range []func([]byte) *pb.ProcessEvent_DataEvent{asStdout, asStderr} {
		r, w, err := pair()
		if err != nil {
			f.shutAll()
			return nil, err
		}
		f.child[i+1] = uintptr(w)
		f.toShut = append(f.toShut, w)
		name := []string{"stdout", "stderr"}[i]
		f.out = append(f.out, source{ours(r, name), wrap, name})
	}
	return f, nil
}

// pump publishes what comes from one output until its end, or until wait runs out after the process ended.
func (p *Process) pump(s source, wg *sync.WaitGroup) {
	buf := make([]byte, chunk)
	for {
		n, err := s.file.Read(buf)
		if n > 0 {
			data := append([]byte(nil), buf[:n]...)
			p.cast.publish(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: s.wrap(data)}})
			p.t.log.Debug("process", "output", "pid", p.pid(), "stream", s.name, "data", string(data[:min(n, 1100)]))
		}
		if err == nil {
			continue
		}
		wg.Done()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			_ = s.file.SetReadDeadline(time.Time{})
			_, _ = io.CopyBuffer(io.Discard, struct{ io.Reader }{s.file}, buf)
		}
		if s.file != p.pty { // the master is closed by wait, for its writers
			_ = s.file.Close()
		}
		return
	}
}

// wait is the process's owner: it ends when the process did.
func (p *Process) wait(exit <-chan syscall.WaitStatus, out []source, kill *time.Timer) {
	var wg sync.WaitGroup
	wg.Add(len(out))
	for _, s := range out {
		go p.pump(s, &wg)
	}
	status := <-exit
	if kill != nil {
		kill.Stop()
	}
	for _, s := range out {
		_ = s.file.SetReadDeadline(time.Now().Add(lingering))
	}
	wg.Wait()
	p.in.shut()
	p.end = endOf(status)
	close(p.done)
	p.cast.close()
	p.t.ended(p)
}

func endOf(status syscall.WaitStatus) *pb.ProcessEvent_EndEvent {
	end := &pb.ProcessEvent_EndEvent{ExitCode: -1}
	if status.Exited() {
		end.Exited = true
		end.ExitCode = int32(status.ExitStatus())
		end.Status = "exit status " + strconv.Itoa(status.ExitStatus())
	} else {
		end.Status = "signal: " + status.Signal().String()
		if status.CoreDump() {
			end.Status += " (core dumped)"
		}
	}
	if end.ExitCode != 0 {
		end.Error = proto.String(end.Status)
	}
	return end
}

func (p *Process) pid() string { return strconv.FormatUint(uint64(p.PID), 10) }
