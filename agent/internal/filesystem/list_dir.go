package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/asuser"
	"emberbox/agent/internal/entry"
	"emberbox/agent/internal/rpc"
)

// maxEntries bounds one answer, which is made in memory.
const maxEntries = 100_000

// ListDir lists a directory, and below it as deep as asked. Symlinks are
// listed, never descended into; the directory itself may be one.
func (s *Service) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	u, path, err := s.at(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	depth := int(max(req.Msg.GetDepth(), 1))
	list := &pb.ListDirResponse{}
	err = asuser.Do(u, func() error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return rpc.Invalid("path is not a directory: %s", path)
		}
		return s.walk(ctx, path, depth, list)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("directory not found: "+path))
	}
	if err != nil {
		return nil, rpc.FileError(err)
	}
	return connect.NewResponse(list), nil
}

func (s *Service) walk(ctx context.Context, dir string, depth int, list *pb.ListDirResponse) error {
	if ctx.Err() != nil {
		return rpc.Ended(ctx)
	}
	found, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range found {
		info, err := f.Info()
		if err != nil {
			continue // gone between the two looks
		}
		if len(list.GetEntries()) >= maxEntries {
			return connect.NewError(connect.CodeResourceExhausted,
				fmt.Errorf("more than %d entries: list a smaller directory or less depth", maxEntries))
		}
		path := filepath.Join(dir, f.Name())
		list.Entries = append(list.Entries, entry.Describe(s.who.Users, path, info))
		if !info.IsDir() || depth == 1 {
			continue
		}
		err = s.walk(ctx, path, depth-1, list)
		if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
