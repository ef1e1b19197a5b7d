package process

import (
	"context"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/process/handler"
	"emberbox/agent/internal/rpc"
)

// StreamInput gives many pieces of input to one process, in order. The first
// event says which process.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *handler.Process
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			var err error
			if p, err = s.find(e.Start.GetProcess()); err != nil {
				return nil, err
			}
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, rpc.Invalid("input before a process was selected: send a start event first")
			}
			if err := deliver(ctx, p, e.Data.GetInput()); err != nil {
				return nil, err
			}
		case *pb.StreamInputRequest_Keepalive:
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}
