package sandbox

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strconv"
	"time"
)

// Why a signed file URL is refused. Clients show these words.
var (
	ErrNoSignature      = errors.New("missing signature query parameter")
	ErrBadSignature     = errors.New("invalid signature")
	ErrExpiredSignature = errors.New("signature is already expired")
)

// Sign returns the signature of one file operation (`read` or `write`). path
// and user are as the URL has them; expiration is the URL's text, empty for none.
//
// Source: the clients' `get_signature`.
func Sign(path, operation, user, token, expiration string) string {
	raw := path + ":" + operation + ":" + user + ":" + token
	if expiration != "" {
		raw += ":" + expiration
	}
	sum := sha256.Sum256([]byte(raw))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// CheckSignature verifies a signed file URL at the time now.
func CheckSignature(signature, path, operation, user, token, expiration string, now time.Time) error {
	if signature == "" {
		return ErrNoSignature
	}
	if token == "" || !Same(signature, Sign(path, operation, user, token, expiration)) {
		return ErrBadSignature
	}
	if expiration != "" {
		until, err := strconv.ParseInt(expiration, 10, 64)
		if err != nil {
			return ErrBadSignature
		}
		if now.Unix() > until {
			return ErrExpiredSignature
		}
	}
	return nil
}
