// Package server puts the agent's routes on one port: HTTP/1.1 and h2c, REST
// and Connect (JSON, binary), gRPC and gRPC-web.
package server

import (
	"net/http"
	"time"

	"connectrpc.com/connect"

	"emberbox/agent/gen/filesystem/filesystemconnect"
	"emberbox/agent/gen/process/processconnect"
	"emberbox/agent/internal/rest"
	"emberbox/agent/internal/sandbox"
)

const (
	// maxMessage bounds one RPC message; files travel over /files.
	maxMessage = 64 << 20
	// Below this a response is not compressed: output chunks come often and small.
	compressFrom = 64 << 10
)

// New returns the agent's server, not yet listening.
func New(state *sandbox.State, api *rest.API, process processconnect.ProcessHandler, files filesystemconnect.FilesystemHandler) *http.Server {
	mux := http.NewServeMux()
	options := connect.WithHandlerOptions(connect.WithReadMaxBytes(maxMessage), connect.WithCompressMinBytes(compressFrom))
	mux.Handle(processconnect.NewProcessHandler(process, options))
	mux.Handle(filesystemconnect.NewFilesystemHandler(files, options))

	mux.HandleFunc("GET /health", api.Health)
	mux.HandleFunc("GET /envs", api.Envs)
	mux.HandleFunc("GET /metrics", api.Metrics)
	mux.HandleFunc("/files", api.Files)
	mux.HandleFunc("POST /files/compose", api.Compose)

	mux.Handle("POST /init", control(state, api.Init))
	mux.Handle("GET /logs", control(state, api.Logs))
	mux.Handle("POST /freeze", control(state, api.Freeze))
	mux.Handle("POST /unfreeze", control(state, api.Unfreeze))
	mux.Handle("POST /collapse", control(state, api.Collapse))
	mux.Handle("POST /fsfreeze", control(state, api.FSFreeze))
	mux.Handle("POST /fsthaw", control(state, api.FSThaw))
	mux.HandleFunc("/", notFound)

	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           cors(secured(state, mux)),
		Protocols:         protocols,
		ReadHeaderTimeout: 30 * time.Second,
		// Longer than any proxy keeps a connection in its pool, so that the proxy closes first.
		IdleTimeout:    640 * time.Second,
		MaxHeaderBytes: 64 << 10,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          1000,
			MaxReceiveBufferPerStream:     4 << 20,
			MaxReceiveBufferPerConnection: 8 << 20,
		},
	}
}

func notFound(w http.ResponseWriter, r *http.Request) {
	rest.Fail(w, http.StatusNotFound, "no such route: "+r.Method+" "+r.URL.Path)
}
