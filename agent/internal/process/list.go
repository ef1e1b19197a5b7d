package process

import (
	"context"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/process"
)

// List lists the running processes that clients started.
func (s *Service) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	list := &pb.ListResponse{}
	for _, p := range s.table.Running() {
		list.Processes = append(list.Processes, &pb.ProcessInfo{Config: p.Config, Pid: p.PID, Tag: p.Tag})
	}
	return connect.NewResponse(list), nil
}
