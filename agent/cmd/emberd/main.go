// Command emberd is the agent inside every machine: it serves E2B's
// in-sandbox contract on one port, and is the machine's PID 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"emberbox/agent/internal/boot"
	"emberbox/agent/internal/cgroup"
	"emberbox/agent/internal/filesystem"
	"emberbox/agent/internal/host"
	"emberbox/agent/internal/logs"
	"emberbox/agent/internal/ports"
	"emberbox/agent/internal/process"
	"emberbox/agent/internal/process/handler"
	"emberbox/agent/internal/reaper"
	"emberbox/agent/internal/rest"
	"emberbox/agent/internal/rpc"
	"emberbox/agent/internal/sandbox"
	"emberbox/agent/internal/server"
	"emberbox/agent/internal/usage"
	"emberbox/agent/internal/users"
)

// version is set by the linker.
var version = "dev"

// controlHashVar is the one thing the node passes through the environment: the
// SHA-256, in hex, of the secret that opens the control routes.
const controlHashVar = "EMBERD_CONTROL_HASH"

func main() {
	port := flag.Uint("port", 49983, "port to serve on")
	address := flag.String("address", "0.0.0.0", "address to serve on")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(version)
		return
	}
	if err := run(net.JoinHostPort(*address, strconv.FormatUint(uint64(*port), 10))); err != nil {
		fmt.Fprintln(os.Stderr, "emberd:", err)
		os.Exit(1)
	}
}

func run(address string) error {
	// The agent is small and shares the machine with the user's work: collect
	// early and give back what is over.
	debug.SetGCPercent(50)
	collectByNeedOnly()
	debug.SetMemoryLimit(64 << 20)
	// Set by hand, the runtime does not watch the cgroup for it; more than a few add memory, not speed.
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 4))

	state := sandbox.New()
	m, err := machine()
	if err != nil {
		return err
	}
	if m.ControlHash != "" {
		if err := state.SetControlHash(m.ControlHash); err != nil {
			return err
		}
	}
	if err := host.Protect(); err != nil {
		return fmt.Errorf("protect the agent: %w", err)
	}
	host.SurvivePipes()
	host.PrepareThreads(12)
	host.RelaxMonitor()
	stop, cancel := untilStopped()
	defer cancel()

	log := logs.New(os.Stdout, m.printed)
	if m.Hostname != "" {
		if err := host.SetHostname(m.Hostname); err != nil {
			log.Error("agent", "host name not set", "error", err.Error())
		}
	}
	db := users.Open()
	reap := reaper.Start()
	who := rpc.Who{State: state, Users: db}
	table := handler.NewTable(state, reap, log, m.groups)
	api := &rest.API{
		State: state, Users: db, Log: log, Run: reap.Run, Meter: usage.NewMeter(), Clock: m.clock,
		Cgroups: m.groups, Disk: m.Disk,
	}
	if m.clock != nil {
		go m.clock.Keep(stop)
	}
	srv := server.New(state, api, process.New(who, table), filesystem.New(who, log))

	listener, err := net.Listen("tcp4", address)
	if err != nil {
		return err
	}
	if tcp, ok := listener.Addr().(*net.TCPAddr); ok {
		go ports.New(uint16(tcp.Port), log).Run(stop, reap)
	}
	log.Info("agent", "ready", "version", version, "address", listener.Addr().String())
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	select {
	case err := <-failed:
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	case <-stop.Done():
		ctx, done := context.WithTimeout(context.Background(), time.Second)
		defer done()
		_ = srv.Shutdown(ctx)
		return nil
	}
}

// surroundings are what this start of the agent runs in.
type surroundings struct {
	boot.Machine
	groups *cgroup.Manager
	clock  *host.HostClock
	// printed is the least level of log lines on stdout.
	printed string
}

// machine boots a microVM when this is its first program, and otherwise reads
// what the node gave by the environment.
func machine() (surroundings, error) {
	if !boot.Wanted() {
		m := boot.Machine{ControlHash: os.Getenv(controlHashVar), Disk: -1}
		return surroundings{Machine: m, printed: "debug"}, nil
	}
	m, err := boot.Run()
	if err != nil {
		return surroundings{}, fmt.Errorf("boot: %w", err)
	}
	groups, err := cgroup.New(m.Cgroups)
	if err != nil {
		return surroundings{}, fmt.Errorf("boot: %w", err)
	}
	// Every byte on an emulated serial line stops the virtual CPU; the node fetches the whole log by /logs.
	return surroundings{Machine: *m, groups: groups, clock: host.OpenHostClock(), printed: "warn"}, nil
}

// untilStopped returns a context that ends on SIGTERM or SIGINT. PID 1 is
// never stopped from inside: the node ends the machine.
func untilStopped() (context.Context, context.CancelFunc) {
	if os.Getpid() == 1 {
		host.IgnoreSignals()
		return context.WithCancel(context.Background())
	}
	return signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
}
