package rest

import (
	"net/http"
	"time"

	"emberbox/agent/internal/host"
)

// Freeze stops what clients started, before the machine's memory is saved
// (node only). With maxWaitMs it waits and reports; without, it only asks.
func (a *API) Freeze(w http.ResponseWriter, r *http.Request) {
	wait, err := number(r, "maxWaitMs")
	if err != nil {
		failWith(w, err)
		return
	}
	if !a.freezeLock(w) {
		return
	}
	defer a.frozen.Unlock()
	if wait <= 0 {
		a.Cgroups.Freeze(0)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	reply(w, a.Cgroups.Freeze(time.Duration(wait)*time.Millisecond))
}

// Unfreeze undoes Freeze (node only).
func (a *API) Unfreeze(w http.ResponseWriter, _ *http.Request) {
	if !a.freezeLock(w) {
		return
	}
	defer a.frozen.Unlock()
	a.done(w, a.Cgroups.Unfreeze())
}

// FSFreeze flushes the machine's disk and holds its writers (node only).
func (a *API) FSFreeze(w http.ResponseWriter, _ *http.Request) {
	if !a.freezeLock(w) {
		return
	}
	defer a.frozen.Unlock()
	a.done(w, host.FreezeDisk(a.Disk))
}

// FSThaw undoes FSFreeze (node only).
func (a *API) FSThaw(w http.ResponseWriter, _ *http.Request) {
	if !a.freezeLock(w) {
		return
	}
	defer a.frozen.Unlock()
	a.done(w, host.ThawDisk(a.Disk))
}

// Collapse packs the agent's own memory into huge pages, so that a restored
// machine touches fewer of them (node only).
func (a *API) Collapse(w http.ResponseWriter, _ *http.Request) {
	result, err := host.Collapse()
	if err != nil {
		failWith(w, err)
		return
	}
	reply(w, result)
}

func (a *API) freezeLock(w http.ResponseWriter) bool {
	if a.frozen.TryLock() {
		return true
	}
	Fail(w, http.StatusServiceUnavailable, "another freeze operation is under way: try again")
	return false
}

func (a *API) done(w http.ResponseWriter, err error) {
	if err != nil {
		failWith(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
