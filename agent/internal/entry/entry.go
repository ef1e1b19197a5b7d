// Package entry describes one file-system entry as clients see it. Its
// functions touch files: call them as the asked user (see asuser).
package entry

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/users"
)

// Stat describes what is at path, not following a final symlink.
func Stat(db *users.DB, path string) (*pb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return Describe(db, path, info), nil
}

// Describe turns info of path into an entry; a symlink's target is looked up.
func Describe(db *users.DB, path string, info os.FileInfo) *pb.EntryInfo {
	e := &pb.EntryInfo{
		Name:         valid(filepath.Base(path)),
		Path:         valid(path),
		Type:         typeOf(info.Mode()),
		Size:         info.Size(),
		Mode:         uint32(info.Mode().Perm()),
		Permissions:  info.Mode().String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = db.Name(st.Uid), db.GroupName(st.Gid)
	}
	if info.Mode()&os.ModeSymlink != 0 {
		e.IsSymlink = true
		e.SymlinkTarget = proto.String(valid(target(path)))
		// Clients older than is_symlink know a link by its target's type.
		if to, err := os.Stat(path); err == nil {
			e.Type = typeOf(to.Mode())
		}
		return e
	}
	if info.Mode().IsRegular() || info.IsDir() {
		e.Metadata = Metadata(path)
	}
	return e
}

// valid makes a name fit for the wire, which is UTF-8 alone; one entry of
// another encoding must not make its whole directory unlistable.
func valid(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

// target is where a link finally leads, or its text when that is nowhere.
func target(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	to, err := os.Readlink(path)
	if err != nil {
		return path
	}
	return to
}

func typeOf(m os.FileMode) pb.FileType {
	switch {
	case m.IsDir():
		return pb.FileType_FILE_TYPE_DIRECTORY
	case m&os.ModeSymlink != 0:
		return pb.FileType_FILE_TYPE_SYMLINK
	}
	// Devices, sockets and pipes too: clients drop entries without a type from lists.
	return pb.FileType_FILE_TYPE_FILE
}
