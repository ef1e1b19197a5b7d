package process

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
)

// Update sets the size of a process's terminal.
func (s *Service) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.Msg.GetPty() != nil {
		if !p.IsPTY() {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no PTY to resize"))
		}
		if err := p.Resize(req.Msg.GetPty().GetSize()); err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	return connect.NewResponse(&pb.UpdateResponse{}), nil
}
