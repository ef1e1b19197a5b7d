package sandbox

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestSignatureIsTheClients(t *testing.T) {
	// The clients' own rule, spelled out: v1_ and unpadded base64 of SHA-256.
	sum := sha256.Sum256([]byte("/home/user/f:read::tok:1700000000"))
	want := "v1_" + strings.TrimRight(base64.StdEncoding.EncodeToString(sum[:]), "=")

	if got := Sign("/home/user/f", "read", "", "tok", "1700000000"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCheckSignature(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	later, earlier := strconv.Itoa(1_700_000_060), strconv.Itoa(1_699_999_940)
	for name, c := range map[string]struct {
		signature, path, operation, user, token, expiration string
		want                                                error
	}{
		"good":             {Sign("p", "read", "", "t", ""), "p", "read", "", "t", "", nil},
		"good with expiry": {Sign("p", "read", "u", "t", later), "p", "read", "u", "t", later, nil},
		"expired":          {Sign("p", "read", "", "t", earlier), "p", "read", "", "t", earlier, ErrExpiredSignature},
		"expiry removed":   {Sign("p", "read", "", "t", later), "p", "read", "", "t", "", ErrBadSignature},
		"expiry moved":     {Sign("p", "read", "", "t", earlier), "p", "read", "", "t", later, ErrBadSignature},
		"expiry no number": {Sign("p", "read", "", "t", "x"), "p", "read", "", "t", "x", ErrBadSignature},
		"other path":       {Sign("p", "read", "", "t", ""), "q", "read", "", "t", "", ErrBadSignature},
		"other operation":  {Sign("p", "read", "", "t", ""), "p", "write", "", "t", "", ErrBadSignature},
		"other user":       {Sign("p", "read", "", "t", ""), "p", "read", "root", "t", "", ErrBadSignature},
		"other token":      {Sign("p", "read", "", "s", ""), "p", "read", "", "t", "", ErrBadSignature},
		"no token":         {Sign("p", "read", "", "", ""), "p", "read", "", "", "", ErrBadSignature},
		"none":             {"", "p", "read", "", "t", "", ErrNoSignature},
	} {
		err := CheckSignature(c.signature, c.path, c.operation, c.user, c.token, c.expiration, now)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func FuzzCheckSignature(f *testing.F) {
	good := Sign("/f", "read", "", "token", "9999999999")
	for _, s := range []string{good, "", "v1_", good[:len(good)-1], good + "=", "v2_" + good[3:]} {
		f.Add(s, "/f", "", "9999999999")
	}
	f.Fuzz(func(t *testing.T, signature, path, user, expiration string) {
		err := CheckSignature(signature, path, "read", user, "token", expiration, time.Unix(1_700_000_000, 0))
		if err == nil && signature != Sign(path, "read", user, "token", expiration) {
			t.Fatalf("accepted %q", signature)
		}
	})
}

func TestControlSecret(t *testing.T) {
	s := New()
	if s.IsControl("") || s.IsControl("x") {
		t.Error("opened without a hash")
	}
	sum := sha256.Sum256([]byte("x"))
	if err := s.SetControlHash(hex.EncodeToString(sum[:])); err != nil {
		t.Fatal(err)
	}
	if !s.IsControl("x") || s.IsControl("y") || s.IsControl("") {
		t.Error("wrong answer")
	}
	if s.SetControlHash("abc") == nil || s.SetControlHash(strings.Repeat("z", 64)) == nil {
		t.Error("a bad hash was taken")
	}
	if !s.IsControl("x") {
		t.Error("a bad hash replaced the good one")
	}
}

func TestTokenOfAnUnsecuredSandboxIsNothing(t *testing.T) {
	s := New()
	if s.IsToken("") || s.Secured() {
		t.Error("an empty token counts")
	}
	s.SetToken("t")
	if !s.IsToken("t") || s.IsToken("") || s.IsToken("tt") || !s.Secured() {
		t.Error("wrong answer")
	}
}

func TestStateIsSafeForConcurrentUse(t *testing.T) {
	s := New()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 200 {
				s.SetEnvs(map[string]string{"i": strconv.Itoa(i)})
				s.SetOwnEnv("o", strconv.Itoa(i))
				s.SetDefaults("u", "/w")
				_ = s.Envs()["i"]
				_ = s.OwnEnvs()["o"]
				_ = s.DefaultUser() + s.DefaultWorkdir()
			}
		})
	}
	wg.Wait()
}
