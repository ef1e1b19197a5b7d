package reaper

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var shared = sync.OnceValue(Start)

func TestEveryOwnerGetsItsOwnStatus(t *testing.T) {
	r := shared()
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			code := string(rune('0' + i%10))
			_, exit, err := r.Fork("/bin/sh", []string{"sh", "-c", "exit " + code}, &syscall.ProcAttr{})
			if err != nil {
				t.Error(err)
				return
			}
			if status := <-exit; status.ExitStatus() != i%10 {
				t.Errorf("want %d, got %d", i%10, status.ExitStatus())
			}
		})
	}
	wg.Wait()
}

func TestKillRefusesTheDead(t *testing.T) {
	r := shared()
	pid, exit, err := r.Fork("/bin/true", []string{"true"}, &syscall.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	<-exit
	if err := r.Kill(pid, false, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("got %v", err)
	}
}

func TestRun(t *testing.T) {
	r := shared()
	if out, err := r.Run(context.Background(), "sh", "-c", "echo out; echo err >&2"); err != nil || out != "out\nerr\n" {
		t.Errorf("%q %v", out, err)
	}
	if _, err := r.Run(context.Background(), "sh", "-c", "exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Run(ctx, "sleep", "60"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if _, err := r.Run(context.Background(), "no-such-program-here"); err == nil {
		t.Error("no error")
	}
}

func TestAProgramHasOrdinaryTimersWhateverThreadStartsIt(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 4_000_000, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 50_000, 0, 0, 0) }()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	argv := []string{"cat", "/proc/self/timerslack_ns"}
	_, exit, err := shared().Fork("/bin/cat", argv, &syscall.ProcAttr{Files: []uintptr{0, write.Fd(), 2}})
	if err != nil {
		t.Fatal(err)
	}
	_ = write.Close()
	<-exit
	if slack, _ := io.ReadAll(read); string(slack) != "50000\n" {
		t.Errorf("%q", slack)
	}
}

func TestItKnowsWhetherAnythingRuns(t *testing.T) {
	r := shared()
	for len(r.Forked()) > 0 {
		<-r.Forked()
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_, exit, err := r.Fork("/bin/cat", []string{"cat"}, &syscall.ProcAttr{Files: []uintptr{read.Fd(), 1, 2}})
	if err != nil {
		t.Fatal(err)
	}

	<-r.Forked()
	if r.Alone() {
		t.Error("alone with a program")
	}
	_ = read.Close()
	_ = write.Close()
	<-exit
	for end := time.Now().Add(10 * time.Second); !r.Alone(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not alone after it has ended")
		}
	}
}
