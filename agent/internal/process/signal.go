package process

import (
	"context"
	"syscall"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/rpc"
)

// SendSignal signals a process and its group.
func (s *Service) SendSignal(ctx context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	var sig syscall.Signal
	switch req.Msg.GetSignal() {
	case pb.Signal_SIGNAL_SIGKILL:
		sig = syscall.SIGKILL
	case pb.Signal_SIGNAL_SIGTERM:
		sig = syscall.SIGTERM
	default:
		return nil, rpc.Invalid("signal %s is not offered: use SIGTERM or SIGKILL", req.Msg.GetSignal())
	}
	if err := p.Signal(sig); err != nil {
		return nil, inputError(ctx, err)
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), nil
}
