package rest

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"emberbox/agent/internal/host"
	"emberbox/agent/internal/sandbox"
)

const maxInit = 8 << 20

// initRequest is the body of POST /init. What is absent stays as it is.
type initRequest struct {
	EnvVars        *map[string]string `json:"envVars"`
	AccessToken    *string            `json:"accessToken"`
	Timestamp      *time.Time         `json:"timestamp"`
	DefaultUser    string             `json:"defaultUser"`
	DefaultWorkdir string             `json:"defaultWorkdir"`
	CABundle       string             `json:"caBundle"`
	HyperloopIP    string             `json:"hyperloopIP"`
	LifecycleID    string             `json:"lifecycleID"`
	VolumeMounts   []volumeMount      `json:"volumeMounts"`

	// Emberbox's own.
	SandboxID   *string         `json:"sandboxID"`
	TemplateID  *string         `json:"templateID"`
	TeamID      *string         `json:"teamID"`
	Hostname    string          `json:"hostname"`
	MachineID   string          `json:"machineId"`
	Entropy     string          `json:"entropy"` // base64
	ControlHash string          `json:"controlHash"`
	Limits      *sandbox.Limits `json:"limits"`
}

type volumeMount struct {
	NFSTarget string `json:"nfs_target"`
	Path      string `json:"path"`
}

// initOne keeps two /init requests from interleaving.
var initOne sync.Mutex

// Init tells the agent which sandbox it serves (node only). It may come again
// at any time: after a claim from the warm pool, a resume, a restore.
//
// The order is that of danger: entropy, clock and identity are right before
// the token opens the sandbox to its user.
func (a *API) Init(w http.ResponseWriter, r *http.Request) {
	came := time.Now()
	var req initRequest
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInit))
	if err == nil && len(strings.TrimSpace(string(body))) > 0 {
		err = json.Unmarshal(body, &req)
	}
	if err != nil {
		Fail(w, http.StatusBadRequest, fmt.Sprintf("malformed body of /init: %v", err))
		return
	}
	initOne.Lock()
	defer initOne.Unlock()
	if req.Timestamp != nil { // it was so when the request came
		*req.Timestamp = req.Timestamp.Add(time.Since(came))
	}
	if err := a.applyInit(r, &req); err != nil {
		a.Log.Error("agent", "init failed", "error", err.Error())
		failWith(w, err)
		return
	}
	// A machine saved while frozen is put to work by the first /init after its restore.
	if err := a.Cgroups.Unfreeze(); err != nil {
		failWith(w, err)
		return
	}
	a.Log.Info("agent", "initialized", "lifecycle_id", req.LifecycleID)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

func (a *API) applyInit(r *http.Request, req *initRequest) error {
	seed, err := base64.StdEncoding.DecodeString(req.Entropy)
	if err != nil {
		return fail(http.StatusBadRequest, "entropy must be base64: %w", err)
	}
	if err := host.AddEntropy(seed); err != nil {
		return err
	}
	if req.Timestamp != nil {
		if err := a.Clock.Set(*req.Timestamp); err != nil {
			return fmt.Errorf("set clock: %w", err)
		}
	}
	if err := a.setIdentity(req); err != nil {
		return err
	}
	if req.CABundle != "" {
		if err := host.Trust([]byte(req.CABundle)); err != nil {
			if errors.Is(err, host.ErrNoCertificates) {
				return failure{http.StatusBadRequest, err}
			}
			return err
		}
	}
	for _, m := range req.VolumeMounts {
		if err := host.MountNFS(r.Context(), a.Run, m.NFSTarget, m.Path); err != nil {
			if errors.Is(err, host.ErrBadMount) {
				return failure{http.StatusBadRequest, err}
			}
			return err
		}
	}
	if req.DefaultWorkdir != "" && !filepath.IsAbs(req.DefaultWorkdir) {
		return fail(http.StatusBadRequest, "defaultWorkdir must be absolute, got '%s'", req.DefaultWorkdir)
	}
	a.State.SetDefaults(req.DefaultUser, req.DefaultWorkdir)
	if req.Limits != nil {
		a.State.SetLimits(*req.Limits)
	}
	if req.EnvVars != nil {
		a.State.SetEnvs(*req.EnvVars)
	}
	if req.ControlHash != "" {
		if err := a.State.SetControlHash(req.ControlHash); err != nil {
			return failure{http.StatusBadRequest, err}
		}
	}
	if req.AccessToken != nil {
		a.State.SetToken(*req.AccessToken)
	}
	return nil
}

// setIdentity applies the names: host, machine, sandbox, template, event address.
func (a *API) setIdentity(req *initRequest) error {
	if req.Hostname != "" {
		if err := host.SetHostname(req.Hostname); err != nil {
			return badName(err)
		}
	}
	if req.MachineID != "" {
		if err := host.SetMachineID(req.MachineID); err != nil {
			return badName(err)
		}
	}
	if req.HyperloopIP != "" {
		ip, err := netip.ParseAddr(req.HyperloopIP)
		if err != nil {
			return fail(http.StatusBadRequest, "hyperloopIP is not an IP address: '%s'", req.HyperloopIP)
		}
		if err := host.SetHost(ip.String(), "events.e2b.local"); err != nil {
			return err
		}
		a.State.SetOwnEnv("E2B_EVENTS_ADDRESS", "http://"+ip.String())
	}
	given := map[string]*string{
		"E2B_SANDBOX_ID": req.SandboxID, "E2B_TEMPLATE_ID": req.TemplateID, "E2B_TEAM_ID": req.TeamID,
	}
	known := a.State.OwnEnvs()
	any := false
	for key, value := range given {
		if value == nil || known[key] == *value { // the same sandbox goes on, with its files in /run
			continue
		}
		any = true
		a.State.SetOwnEnv(key, *value)
		if err := host.WriteRunFile("."+key, *value); err != nil {
			return err
		}
	}
	if any {
		return host.WriteRunFile(".E2B_SANDBOX", "true")
	}
	return nil
}

func badName(err error) error {
	if errors.Is(err, host.ErrBadName) {
		return failure{http.StatusBadRequest, err}
	}
	return err
}
