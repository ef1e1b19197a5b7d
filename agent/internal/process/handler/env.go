package handler

import (
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"emberbox/agent/internal/sandbox"
	"emberbox/agent/internal/users"
)

const sanePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// agentPath is emberd's own PATH at exec, kept before the environment is wiped.
var agentPath = os.Getenv("PATH")

// environ is what a process of u starts with; later entries win: PATH and
// identity, then the sandbox's variables, emberd's own, the request's.
func environ(st *sandbox.State, u *users.User, request map[string]string) []string {
	env := map[string]string{"PATH": agentPath, "HOME": u.Home, "USER": u.Name, "LOGNAME": u.Name}
	if agentPath == "" {
		env["PATH"] = sanePath
	}
	for _, layer := range []map[string]string{st.Envs(), st.OwnEnvs(), request} {
		for k, v := range layer {
			// The kernel takes NUL-terminated KEY=value strings: these could not be written as such.
			if k != "" && !strings.ContainsAny(k, "=\x00") && strings.IndexByte(v, 0) < 0 {
				env[k] = v
			}
		}
	}
	list := make([]string, 0, len(env))
	for k, v := range env {
		list = append(list, k+"="+v)
	}
	sort.Strings(list)
	return list
}

// lookPath finds cmd in the PATH of env, as the shell would. Call it as the user.
func lookPath(cmd, cwd string, env []string) (string, error) {
	if strings.Contains(cmd, "/") {
		return cmd, nil
	}
	path := ""
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	err := error(syscall.ENOENT)
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(cwd, dir)
		}
		file := filepath.Join(dir, cmd)
		info, statErr := os.Stat(file)
		if statErr != nil || info.IsDir() {
			continue
		}
		if info.Mode()&0o111 != 0 {
			return file, nil
		}
		err = syscall.EACCES
	}
	return "", err
}
