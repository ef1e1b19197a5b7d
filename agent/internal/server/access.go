package server

import (
	"errors"
	"net/http"

	"connectrpc.com/connect"

	"emberbox/agent/internal/rest"
	"emberbox/agent/internal/sandbox"
)

const (
	tokenHeader   = "X-Access-Token"
	controlHeader = "X-Ember-Control"
)

var errToken = errors.New("missing or wrong access token: send the sandbox's token in X-Access-Token")

// open routes check for themselves: /health needs nothing, /files takes
// signatures, control routes another secret.
var open = map[string]bool{"/health": true, "/files": true}

// secured asks for the sandbox's token on everything that is not open. The
// node's secret opens the rest as well: it runs build steps before there is a token.
func secured(state *sandbox.State, next http.Handler) http.Handler {
	writer := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !state.Secured() || open[r.URL.Path] || controlRoutes[r.URL.Path] || state.IsToken(r.Header.Get(tokenHeader)) ||
			state.IsControl(r.Header.Get(controlHeader)) {
			next.ServeHTTP(w, r)
			return
		}
		if writer.IsSupported(r) {
			_ = writer.Write(w, r, connect.NewError(connect.CodeUnauthenticated, errToken))
			return
		}
		rest.Fail(w, http.StatusUnauthorized, errToken.Error())
	})
}

// controlRoutes are the node's alone.
var controlRoutes = map[string]bool{
	"/init": true, "/logs": true, "/freeze": true, "/unfreeze": true,
	"/collapse": true, "/fsfreeze": true, "/fsthaw": true,
}

// control hides a route from everyone without the node's secret.
func control(state *sandbox.State, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !state.IsControl(r.Header.Get(controlHeader)) {
			notFound(w, r)
			return
		}
		next(w, r)
	})
}
