package rest

import (
	"net/http"
	"time"

	"emberbox/agent/internal/sandbox"
)

// Files serves /files by method.
func (a *API) Files(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		a.download(w, r)
	case http.MethodPost:
		a.upload(w, r)
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		Fail(w, http.StatusMethodNotAllowed, "method "+r.Method+" is not allowed on /files: use GET or POST")
	}
}

// mayUse checks the token or the signature of a file request.
func (a *API) mayUse(r *http.Request, operation string) error {
	if !a.State.Secured() {
		return nil
	}
	if given := r.Header.Get("X-Access-Token"); given != "" {
		if a.State.IsToken(given) {
			return nil
		}
		return fail(http.StatusUnauthorized, "access token present in header but does not match")
	}
	q := r.URL.Query()
	err := sandbox.CheckSignature(q.Get("signature"), q.Get("path"), operation, q.Get("username"),
		a.State.Token(), q.Get("signature_expiration"), time.Now())
	if err != nil {
		return failure{http.StatusUnauthorized, err}
	}
	return nil
}

// bySignature says whether a file request that may be made has a signature for
// it and no token.
func (a *API) bySignature(r *http.Request) bool {
	return a.State.Secured() && r.Header.Get("X-Access-Token") == ""
}
