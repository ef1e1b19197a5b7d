package handler

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"
)

// Why input cannot be given.
var (
	ErrNoStdin     = errors.New("stdin not enabled or closed: start the process with stdin to send input to it")
	ErrPTYStdin    = errors.New("cannot close stdin of a PTY: send Ctrl+D (0x04) instead")
	ErrStdinClosed = errors.New("the process has closed its stdin")
)

// input is the writing end of a process's stdin or terminal.
type input struct {
	isPTY bool

	writing sync.Mutex // keeps the chunks of two writers whole

	mu   sync.Mutex
	file *os.File // nil when there is none, or no more
}

func (i *input) write(ctx context.Context, data []byte) error {
	i.writing.Lock()
	defer i.writing.Unlock()
	i.mu.Lock()
	file := i.file
	i.mu.Unlock()
	if file == nil {
		return ErrNoStdin
	}
	// A process that does not read fills the pipe; the caller's deadline or leaving ends the wait.
	_ = file.SetWriteDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = file.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := file.Write(data)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.EIO):
		return ErrStdinClosed
	case errors.Is(err, os.ErrClosed):
		return ErrNoStdin
	}
	return err
}

// close is the client's: for pipes only.
func (i *input) close() error {
	if i.isPTY {
		return ErrPTYStdin
	}
	if !i.shut() {
		return ErrNoStdin
	}
	return nil
}

// shut closes what is open and says whether anything was.
func (i *input) shut() bool {
	i.mu.Lock()
	file := i.file
	i.file = nil
	i.mu.Unlock()
	if file == nil {
		return false
	}
	_ = file.Close()
	return true
}
