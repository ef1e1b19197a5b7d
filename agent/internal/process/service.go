// Package process serves E2B's process service, one file an RPC. What a
// process is lives in package handler.
package process

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/gen/process/processconnect"
	"emberbox/agent/internal/process/handler"
	"emberbox/agent/internal/rpc"
)

// Service implements process.Process.
type Service struct {
	who   rpc.Who
	table *handler.Table
}

var _ processconnect.ProcessHandler = (*Service)(nil)

// New returns the service over a table of processes.
func New(who rpc.Who, table *handler.Table) *Service { return &Service{who, table} }

// find returns the running process a request names.
func (s *Service) find(sel *pb.ProcessSelector) (*handler.Process, error) {
	if sel.GetSelector() == nil {
		return nil, rpc.Invalid("no process selected: give a pid or a tag")
	}
	if p := s.table.Find(sel); p != nil {
		return p, nil
	}
	return nil, notFound(sel)
}

func notFound(sel *pb.ProcessSelector) error {
	if by, ok := sel.GetSelector().(*pb.ProcessSelector_Tag); ok {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag '%s' not found", by.Tag))
	}
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", sel.GetPid()))
}

// follow sends a process's life to a stream: start, output as it comes, end.
func follow(ctx context.Context, p *handler.Process, sub *handler.Subscription, quiet time.Duration, send func(*pb.ProcessEvent) error) error {
	defer sub.Cancel()
	start := &pb.ProcessEvent_StartEvent{Pid: p.PID}
	if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	silence := time.NewTimer(quiet)
	defer silence.Stop()
	for {
		select {
		case e, more := <-sub.Events:
			if more {
				if err := send(e); err != nil {
					return err
				}
				silence.Reset(quiet)
				continue
			}
			<-p.Done()
			return send(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: p.End()}})
		case <-silence.C:
			if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
			silence.Reset(quiet)
		case <-ctx.Done():
			return rpc.Ended(ctx)
		}
	}
}

// inputError gives an input's error its code.
func inputError(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return rpc.Ended(ctx)
	case errors.Is(err, handler.ErrNoStdin), errors.Is(err, handler.ErrStdinClosed), errors.Is(err, handler.ErrPTYStdin):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, syscall.ESRCH):
		return connect.NewError(connect.CodeNotFound, errors.New("process has ended"))
	}
	return connect.NewError(connect.CodeInternal, err)
}

// deliver writes one input to a process, refusing the wrong kind.
func deliver(ctx context.Context, p *handler.Process, in *pb.ProcessInput) error {
	switch data := in.GetInput().(type) {
	case *pb.ProcessInput_Stdin:
		if p.IsPTY() {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has a PTY: send its input as 'pty', not 'stdin'"))
		}
		return inputError(ctx, p.Write(ctx, data.Stdin))
	case *pb.ProcessInput_Pty:
		if !p.IsPTY() {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no PTY: send its input as 'stdin', not 'pty'"))
		}
		return inputError(ctx, p.Write(ctx, data.Pty))
	}
	return rpc.Invalid("input is empty: give 'stdin' or 'pty'")
}
