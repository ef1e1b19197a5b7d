package rest

import (
	"net/http"

	"emberbox/agent/internal/logs"
)

// Logs answers log entries after the cursor, oldest first (node only). Ask
// again with the cursor of the answer.
func (a *API) Logs(w http.ResponseWriter, r *http.Request) {
	cursor, err := number(r, "cursor")
	if err != nil {
		failWith(w, err)
		return
	}
	limit, err := number(r, "limit")
	if err != nil {
		failWith(w, err)
		return
	}
	if cursor < 0 || limit < 0 {
		Fail(w, http.StatusBadRequest, "cursor and limit must not be negative")
		return
	}
	if limit == 0 || limit > 1000 {
		limit = 1000
	}
	entries, next := a.Log.After(uint64(cursor), int(limit))
	reply(w, struct {
		Entries []logs.Entry `json:"entries"`
		Cursor  uint64       `json:"cursor"`
	}{entries, next})
}
