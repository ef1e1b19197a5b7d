package process

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/process/handler"
	"emberbox/agent/internal/rpc"
)

// Start starts a program and follows it. The call's deadline kills the
// program; a caller that goes away does not.
func (s *Service) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	if req.Msg.GetProcess().GetCmd() == "" {
		return rpc.Invalid("no command: process.cmd is empty")
	}
	u, err := s.who.User(req.Header())
	if err != nil {
		return err
	}
	spec := handler.Spec{
		User: u, Config: req.Msg.GetProcess(), PTY: req.Msg.Pty, Tag: req.Msg.Tag,
		Stdin: req.Msg.Stdin == nil || req.Msg.GetStdin(),
	}
	if deadline, ok := ctx.Deadline(); ok {
		if spec.Timeout = time.Until(deadline); spec.Timeout <= 0 {
			return rpc.Ended(ctx)
		}
	}
	p, sub, err := s.table.Start(spec)
	if err != nil {
		return startError(spec.Config.GetCmd(), err)
	}
	err = follow(ctx, p, sub, rpc.Keepalive(req.Header()), func(e *pb.ProcessEvent) error {
		if e.GetEnd() != nil {
			// The kill at the deadline and the deadline itself race; the answer must not.
			select {
			case <-p.TimedOut():
				return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
			default:
			}
		}
		return stream.Send(&pb.StartResponse{Event: e})
	})
	return err
}

func startError(cmd string, err error) error {
	switch {
	case errors.Is(err, handler.ErrBadCwd) && errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, unwrapKind(err))
	case errors.Is(err, handler.ErrBadCwd):
		return connect.NewError(connect.CodeInvalidArgument, unwrapKind(err))
	case errors.Is(err, handler.ErrBadStart):
		return rpc.Invalid("error starting process '%s': %w", cmd, unwrapKind(err))
	}
	return rpc.FileError(err)
}

// unwrapKind leaves out the word that only sorts the error.
func unwrapKind(err error) error {
	if both, ok := err.(interface{ Unwrap() []error }); ok {
		if list := both.Unwrap(); len(list) == 2 {
			return list[1]
		}
	}
	return err
}
