package server

import "net/http"

const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
	corsExposed = "Location, Content-Encoding, Content-Disposition, Content-Range, ETag, X-Content-Type-Options, Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin"
)

// cors lets any web page call: what protects a sandbox is its token, which a
// browser never sends by itself. Asked-for headers are named in the answer,
// because `*` does not cover Authorization.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", corsExposed)
		if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h.Set("Access-Control-Allow-Methods", corsMethods)
		asked := r.Header.Get("Access-Control-Request-Headers")
		if asked == "" {
			asked = "*"
		}
		h.Set("Access-Control-Allow-Headers", asked)
		h.Set("Access-Control-Max-Age", "7200")
		h.Add("Vary", "Access-Control-Request-Headers")
		w.WriteHeader(http.StatusNoContent)
	})
}
