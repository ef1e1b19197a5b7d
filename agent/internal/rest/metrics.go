package rest

import "net/http"

// Metrics answers what the machine uses now.
func (a *API) Metrics(w http.ResponseWriter, _ *http.Request) {
	reply(w, a.Meter.Read(a.State.Limits()))
}
