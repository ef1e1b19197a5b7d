package host

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Where distributions keep the bundle that TLS libraries read. The files are
// appended to directly, because update-ca-certificates takes seconds and need
// not be installed.
var bundles = []string{
	"/etc/ssl/certs/ca-certificates.crt",                // Debian, Arch, Gentoo
	"/etc/pki/tls/certs/ca-bundle.crt",                  // Fedora, RHEL
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // RHEL's own copy
	"/etc/ssl/ca-bundle.pem",                            // openSUSE
	"/etc/ssl/cert.pem",                                 // Alpine
}

// Where distributions look for local certificates when they rebuild the bundle.
var anchors = []string{
	"/usr/local/share/ca-certificates",
	"/etc/pki/ca-trust/source/anchors",
}

// ErrNoCertificates says that a CA bundle holds no certificate.
var ErrNoCertificates = errors.New("caBundle holds no PEM certificate")

// Trust installs PEM certificates into the system's trust store.
func Trust(bundle []byte) error {
	var certs [][]byte
	var all []byte
	for rest := bundle; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			cert := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})
			certs = append(certs, cert)
			all = append(all, cert...)
		}
	}
	if len(certs) == 0 {
		return ErrNoCertificates
	}
	for _, dir := range anchors {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			if err := writeIfChanged(filepath.Join(dir, "emberbox-ca.crt"), all); err != nil {
				return fmt.Errorf("install CA: %w", err)
			}
		}
	}
	found := false
	for _, path := range bundles {
		old, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("install CA: %w", err)
		}
		found = true
		if err := appendMissing(path, old, certs); err != nil {
			return err
		}
	}
	if found {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(bundles[0]), 0o755); err != nil {
		return allowed(err)
	}
	return writeIfChanged(bundles[0], all)
}

func appendMissing(path string, have []byte, certs [][]byte) error {
	now := have
	for _, cert := range certs {
		if bytes.Contains(now, bytes.TrimSpace(cert)) {
			continue
		}
		if len(now) > 0 && now[len(now)-1] != '\n' {
			now = append(now, '\n')
		}
		now = append(now, cert...)
	}
	if err := writeIfChanged(path, now); err != nil {
		return fmt.Errorf("install CA: %w", err)
	}
	return nil
}
