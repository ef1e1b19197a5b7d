package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/user"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	fspb "emberbox/agent/gen/filesystem"
	"emberbox/agent/gen/filesystem/filesystemconnect"
	pb "emberbox/agent/gen/process"
	"emberbox/agent/gen/process/processconnect"
	"emberbox/agent/internal/filesystem"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/process"
	"emberbox/agent/internal/process/handler"
	"emberbox/agent/internal/reaper"
	"emberbox/agent/internal/rest"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/sandbox"
	"emberbox/agent/internal/usage"
	"emberbox/agent/internal/users"
)

var reap = reaper.Start()

// agent serves a whole agent on a loopback port, for the user that runs the test.
func agent(t testing.TB) (string, *sandbox.State) {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	state := sandbox.New()
	state.SetDefaults(me.Username, "")
	db := users.Open()
	log := logs.New(nil, "debug")
	who := rpc.Who{State: state, Users: db}
	api := &rest.API{State: state, Users: db, Log: log, Run: reap.Run, Meter: usage.NewMeter(), Disk: -1}
	srv := New(state, api, process.New(who, handler.NewTable(state, reap, log, nil)), filesystem.New(who, log))
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(listener) }()
	t.Cleanup(func() { _ = srv.Close() })
	return "http://" + listener.Addr().String(), state
}

func h2c() *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{Protocols: p, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}}
}

func TestEveryProtocolRunsACommand(t *testing.T) {
	url, _ := agent(t)
	for name, c := range map[string]struct {
		client  *http.Client
		options []connect.ClientOption
	}{
		"connect, JSON":       {http.DefaultClient, []connect.ClientOption{connect.WithProtoJSON()}},
		"connect, binary":     {http.DefaultClient, nil},
		"connect, h2c":        {h2c(), nil},
		"gRPC":                {h2c(), []connect.ClientOption{connect.WithGRPC()}},
		"gRPC-web":            {http.DefaultClient, []connect.ClientOption{connect.WithGRPCWeb()}},
		"connect, compressed": {http.DefaultClient, []connect.ClientOption{connect.WithSendGzip()}},
	} {
		t.Run(name, func(t *testing.T) {
			client := processconnect.NewProcessClient(c.client, url, c.options...)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()

			out, end := runCommand(ctx, t, client, "echo out; echo err >&2; exit 3")

			if out != "out\nerr\n" && out != "err\nout\n" || end.GetExitCode() != 3 || !end.GetExited() || end.GetError() != "exit status 3" {
				t.Errorf("out %q, end %v", out, end)
			}
			_, err := client.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{
				Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: 1 << 30}}, Signal: pb.Signal_SIGNAL_SIGKILL,
			}))
			if connect.CodeOf(err) != connect.CodeNotFound {
				t.Errorf("signal to nobody: %v", err)
			}
		})
	}
}

func runCommand(ctx context.Context, t testing.TB, client processconnect.ProcessClient, script string) (string, *pb.ProcessEvent_EndEvent) {
	t.Helper()
	no := false
	stream, err := client.Start(ctx, connect.NewRequest(&pb.StartRequest{
		Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}, Stdin: &no,
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	var out strings.Builder
	var end *pb.ProcessEvent_EndEvent
	for stream.Receive() {
		e := stream.Msg().GetEvent()
		out.Write(e.GetData().GetStdout())
		out.Write(e.GetData().GetStderr())
		if e.GetEnd() != nil {
			end = e.GetEnd()
		}
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	return out.String(), end
}

func TestStreamInputOverHTTP2(t *testing.T) {
	url, _ := agent(t)
	client := processconnect.NewProcessClient(h2c(), url)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tag := "cat"
	stream, err := client.Start(ctx, connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Tag: &tag}))
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	cat := &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}

	in := client.StreamInput(ctx)
	_ = in.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: cat}}})
	_ = in.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}})
	_ = in.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("hello")}},
	}}})
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: cat})); err != nil {
		t.Fatal(err)
	}

	out := ""
	for stream.Receive() {
		out += string(stream.Msg().GetEvent().GetData().GetStdout())
	}
	if out != "hello" || stream.Err() != nil {
		t.Errorf("%q %v", out, stream.Err())
	}
}

func TestADeadlineEndsTheStreamWithItsCode(t *testing.T) {
	url, _ := agent(t)
	// The header alone, without a client-side deadline that would speak first.
	body := []byte("\x00\x00\x00\x00")
	message := []byte(`{"process":{"cmd":"sleep","args":["30"]},"stdin":false}`)
	body = append(append(body, byte(len(message))), message...)
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, url+processconnect.ProcessStartProcedure, bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/connect+json")
	req.Header.Set("Connect-Protocol-Version", "1")
	req.Header.Set("Connect-Timeout-Ms", "300")

	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, _ := io.ReadAll(resp.Body)

	if !bytes.Contains(answer, []byte(`"code":"deadline_exceeded"`)) {
		t.Errorf("got %q", answer)
	}
}

func TestWatchDirStreams(t *testing.T) {
	url, _ := agent(t)
	client := filesystemconnect.NewFilesystemClient(http.DefaultClient, url, connect.WithProtoJSON())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	req := connect.NewRequest(&fspb.WatchDirRequest{Path: dir, IncludeEntry: true})
	req.Header().Set("Keepalive-Ping-Interval", "1")
	stream, err := client.WatchDir(ctx, req)
	if err != nil || !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatal(err, stream.Msg(), stream.Err())
	}
	if !stream.Receive() || stream.Msg().GetKeepalive() == nil {
		t.Fatalf("no keepalive: %v %v", stream.Msg(), stream.Err())
	}

	if err := os.WriteFile(dir+"/f", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	e := stream.Msg().GetFilesystem()
	if e.GetName() != "f" || e.GetType() != fspb.EventType_EVENT_TYPE_CREATE || e.GetEntry().GetPath() != dir+"/f" {
		t.Errorf("got %v", e)
	}
}

func TestATokenIsAskedForInTheCallersProtocol(t *testing.T) {
	url, state := agent(t)
	state.SetToken("secret")
	ctx := t.Context()
	for name, options := range map[string][]connect.ClientOption{
		"connect": nil, "JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()}, "gRPC-web": {connect.WithGRPCWeb()},
	} {
		client := processconnect.NewProcessClient(h2c(), url, options...)
		_, err := client.List(ctx, connect.NewRequest(&pb.ListRequest{}))
		if connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s: %v", name, err)
		}
		req := connect.NewRequest(&pb.ListRequest{})
		req.Header().Set("X-Access-Token", "secret")
		if _, err := client.List(ctx, req); err != nil {
			t.Errorf("%s with the token: %v", name, err)
		}
	}
	for path, want := range map[string]int{"/health": 204, "/envs": 401, "/metrics": 401, "/files?path=/etc/passwd": 401, "/init": 404, "/nothing": 401} {
		resp, err := http.Get(url + path) //nolint:noctx // a test
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
}

func TestTheControlSecretOpensEverything(t *testing.T) {
	url, state := agent(t)
	state.SetToken("secret")
	sum := sha256.Sum256([]byte("node"))
	if err := state.SetControlHash(hex.EncodeToString(sum[:])); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/envs", "/logs", "/metrics"} {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url+path, nil)
		req.Header.Set("X-Ember-Control", "node")
		resp, err := http.DefaultClient.Do(req)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %v %v", path, resp, err)
			continue
		}
		_ = resp.Body.Close()
	}
}

func TestFailuresAreJSON(t *testing.T) {
	for _, c := range []struct {
		status int
		text   string
	}{{404, "no such route"}, {405, "is not allowed"}} {
		w := httptest.NewRecorder()
		rest.Fail(w, c.status, c.text)
		if w.Code != c.status || !strings.Contains(w.Body.String(), `"message":"`+c.text) || w.Header().Get("Content-Type") != "application/json; charset=utf-8" {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	}
}

func BenchmarkTrue(b *testing.B) {
	url, _ := agent(b)
	client := processconnect.NewProcessClient(http.DefaultClient, url, connect.WithProtoJSON())
	no := false
	for b.Loop() {
		stream, err := client.Start(b.Context(), connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/true"}, Stdin: &no}))
		if err != nil {
			b.Fatal(err)
		}
		for stream.Receive() {
		}
		if err := errors.Join(stream.Err(), stream.Close()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOutput(b *testing.B) {
	url, _ := agent(b)
	for name, options := range map[string][]connect.ClientOption{"json": {connect.WithProtoJSON()}, "proto": nil} {
		b.Run(name, func(b *testing.B) {
			client := processconnect.NewProcessClient(http.DefaultClient, url, options...)
			b.SetBytes(20 << 20)
			for b.Loop() {
				out, _ := runCommand(b.Context(), b, client, "head -c 20971520 /dev/zero")
				if len(out) != 20<<20 {
					b.Fatal(len(out))
				}
			}
		})
	}
}
