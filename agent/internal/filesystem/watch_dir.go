package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"time"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/watch"
)

// watchSpec is what both kinds of watch request carry.
type watchSpec interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// WatchDir streams what changes in a directory until the caller leaves.
func (s *Service) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	w, err := s.watch(req.Header(), req.Msg)
	if err != nil {
		return err
	}
	defer w.Close()
	start := &pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	quiet := rpc.Keepalive(req.Header())
	silence := time.NewTimer(quiet)
	defer silence.Stop()
	for {
		select {
		case e, more := <-w.Events:
			if !more {
				return connect.NewError(connect.CodeInternal, errors.New("the watcher ended: see the sandbox's log"))
			}
			if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: e}}); err != nil {
				return err
			}
		case <-silence.C:
			alive := &pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}}
			if err := stream.Send(alive); err != nil {
				return err
			}
		case <-ctx.Done():
			return rpc.Ended(ctx)
		}
		silence.Reset(quiet)
	}
}

func (s *Service) watch(h http.Header, spec watchSpec) (*watch.Watcher, error) {
	u, path, err := s.at(h, spec.GetPath())
	if err != nil {
		return nil, err
	}
	w, err := watch.New(watch.Spec{
		User: u, Path: path,
		Recursive: spec.GetRecursive(), Entries: spec.GetIncludeEntry(), NetworkMounts: spec.GetAllowNetworkMounts(),
	}, s.who.Users, s.log)
	switch {
	case err == nil:
		return w, nil
	case errors.Is(err, watch.ErrNotDirectory), errors.Is(err, watch.ErrNetworkMount):
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, fs.ErrNotExist):
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("path %s not found", path))
	case watch.IsLimit(err):
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("too many watchers or watched directories: remove some: %w", err))
	}
	return nil, rpc.FileError(err)
}
