package rest

import "net/http"

// Envs answers the sandbox's environment variables.
func (a *API) Envs(w http.ResponseWriter, _ *http.Request) { reply(w, a.State.Envs()) }
