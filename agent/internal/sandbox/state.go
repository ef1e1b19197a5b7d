// Package sandbox holds what the node told emberd about the sandbox it serves:
// identity, tokens, environment, defaults. POST /init writes it, everything
// else reads it.
package sandbox

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"maps"
	"sync"
)

// State is safe for concurrent use.
type State struct {
	mu          sync.RWMutex
	controlHash []byte
	token       string
	envs        map[string]string
	own         map[string]string
	user        string
	workdir     string
	limits      Limits
}

// Limits are the sizes the node gave this machine; zero means not told.
type Limits struct {
	CPUCount    float64 `json:"cpuCount"`
	MemoryBytes int64   `json:"memoryBytes"`
	DiskBytes   int64   `json:"diskBytes"`
}

// New returns a state whose default user is `user`.
func New() *State {
	return &State{
		envs: map[string]string{},
		own:  map[string]string{"E2B_SANDBOX": "true"},
		user: "user",
	}
}

// SetControlHash sets the SHA-256, in hex, of the secret that opens the control routes.
func (s *State) SetControlHash(hexHash string) error {
	hash, err := hex.DecodeString(hexHash)
	if err != nil || len(hash) != sha256.Size {
		return errors.New("control hash must be 64 hex digits (SHA-256 of the control secret)")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.controlHash = hash
	return nil
}

// IsControl says whether secret opens the control routes. Without a hash nothing does.
func (s *State) IsControl(secret string) bool {
	s.mu.RLock()
	want := s.controlHash
	s.mu.RUnlock()
	if want == nil || secret == "" {
		return false
	}
	got := sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(got[:], want) == 1
}

// SetToken sets the sandbox token; empty means an unsecured sandbox.
func (s *State) SetToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
}

// Secured says whether a token is set.
func (s *State) Secured() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.token != ""
}

// IsToken says whether token is the sandbox's. It is false for an unsecured sandbox.
func (s *State) IsToken(token string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.token != "" && Same(token, s.token)
}

// Token returns the sandbox token, for signatures. Never log it.
func (s *State) Token() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.token
}

// Same compares two secrets in constant time, whatever their lengths.
func Same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// SetEnvs replaces the sandbox's environment.
func (s *State) SetEnvs(envs map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.envs = maps.Clone(envs)
}

// Envs returns a copy of the sandbox's environment.
func (s *State) Envs() map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.envs)
}

// SetOwnEnv sets a variable that emberd itself gives every process; empty removes it.
func (s *State) SetOwnEnv(key, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value == "" {
		delete(s.own, key)
		return
	}
	s.own[key] = value
}

// Claimed says whether the machine is a sandbox already; before, only its node runs something in it.
func (s *State) Claimed() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.own["E2B_SANDBOX_ID"] != ""
}

// OwnEnvs returns what emberd itself gives every process (E2B_SANDBOX, ...).
func (s *State) OwnEnvs() map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.own)
}

// SetDefaults sets the default user and work directory; empty leaves each as it is.
func (s *State) SetDefaults(user, workdir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if user != "" {
		s.user = user
	}
	if workdir != "" {
		s.workdir = workdir
	}
}

// DefaultUser is who acts when a request names nobody.
func (s *State) DefaultUser() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.user
}

// DefaultWorkdir is where an empty path or cwd is; empty means the user's home.
func (s *State) DefaultWorkdir() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workdir
}

// SetLimits records the machine's sizes.
func (s *State) SetLimits(l Limits) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits = l
}

// Limits returns the machine's sizes.
func (s *State) Limits() Limits {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.limits
}
