package process

import (
	"context"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
	"emberbox/agent/internal/rpc"
)

// Connect follows a program that runs already, from now on. One that ended a
// moment ago still tells its end.
func (s *Service) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], stream *connect.ServerStream[pb.ConnectResponse]) error {
	sel := req.Msg.GetProcess()
	if sel.GetSelector() == nil {
		return rpc.Invalid("no process selected: give a pid or a tag")
	}
	p := s.table.FindRecent(sel)
	if p == nil {
		return notFound(sel)
	}
	return follow(ctx, p, p.Subscribe(), rpc.Keepalive(req.Header()), func(e *pb.ProcessEvent) error {
		return stream.Send(&pb.ConnectResponse{Event: e})
	})
}
