package reaper

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
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
