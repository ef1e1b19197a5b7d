// Package usage measures what the machine uses: from its cgroup where that is
// visible (v2 or v1), else from /proc.
package usage

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"emberbox/agent/internal/sandbox"
)

// Metrics is one sample, in the words of the agent's OpenAPI page. Sizes are bytes.
type Metrics struct {
	TS          int64   `json:"ts"` // unix seconds
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"` // of all CPUs together, 0-100
	MemTotal    int64   `json:"mem_total"`
	MemUsed     int64   `json:"mem_used"`
	MemCache    int64   `json:"mem_cache"`
	MemTotalMiB int64   `json:"mem_total_mib"`
	MemUsedMiB  int64   `json:"mem_used_mib"`
	DiskUsed    int64   `json:"disk_used"`
	DiskTotal   int64   `json:"disk_total"`
}

// Meter samples; CPU use is the mean since the sample before.
type Meter struct {
	root string // "" but in tests

	mu   sync.Mutex
	busy time.Duration
	at   time.Time
	pct  float64
}

// soonest is the least time between two CPU means: over less they are noise.
const soonest = 500 * time.Millisecond

// NewMeter returns a meter that counts from now.
func NewMeter() *Meter { return newMeter("") }

func newMeter(root string) *Meter {
	m := &Meter{root: root, at: time.Now()}
	m.busy = m.cpuBusy()
	return m
}

// Read samples now. Limits that the node told win over what the kernel shows.
func (m *Meter) Read(l sandbox.Limits) Metrics {
	now := time.Now()
	s := Metrics{TS: now.Unix(), CPUCount: runtime.NumCPU()}
	if l.CPUCount > 0 {
		s.CPUCount = max(1, int(l.CPUCount+0.5))
	} else if n := m.cpuQuota(); n > 0 {
		s.CPUCount = n
	}
	s.CPUUsedPct = m.cpuPct(now, s.CPUCount)
	m.memory(&s)
	if l.MemoryBytes > 0 {
		s.MemTotal = l.MemoryBytes
	}
	s.MemTotalMiB, s.MemUsedMiB = s.MemTotal>>20, s.MemUsed>>20
	var fs unix.Statfs_t
	if unix.Statfs("/", &fs) == nil {
		s.DiskTotal = int64(fs.Blocks) * fs.Bsize
		s.DiskUsed = int64(fs.Blocks-fs.Bfree) * fs.Bsize
	}
	if l.DiskBytes > 0 {
		s.DiskTotal = l.DiskBytes
	}
	return s
}

func (m *Meter) cpuPct(now time.Time, cpus int) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	passed := now.Sub(m.at)
	if passed < soonest {
		return m.pct
	}
	busy := m.cpuBusy()
	pct := 100 * float64(busy-m.busy) / float64(passed) / float64(cpus)
	m.pct = float64(int(min(max(pct, 0), 100)*100)) / 100
	m.busy, m.at = busy, now
	return m.pct
}

// cpuBusy is the CPU time used so far.
func (m *Meter) cpuBusy() time.Duration {
	if us, ok := m.field("/sys/fs/cgroup/cpu.stat", "usage_usec"); ok && m.has("/sys/fs/cgroup/memory.current") {
		return time.Duration(us) * time.Microsecond
	}
	if ns, ok := m.number("/sys/fs/cgroup/cpuacct/cpuacct.usage"); ok {
		return time.Duration(ns)
	}
	// cpu user nice system idle iowait irq softirq ...; in ticks of 10 ms.
	line, _, _ := strings.Cut(m.read("/proc/stat"), "\n")
	var ticks int64
	for i, f := range strings.Fields(line) {
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, _ := strconv.ParseInt(f, 10, 64)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func (m *Meter) cpuQuota() int {
	if f := strings.Fields(m.read("/sys/fs/cgroup/cpu.max")); len(f) == 2 {
		return quota(f[0], f[1])
	}
	return quota(strings.TrimSpace(m.read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")),
		strings.TrimSpace(m.read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")))
}

func quota(of, period string) int {
	q, err1 := strconv.ParseFloat(of, 64)
	p, err2 := strconv.ParseFloat(period, 64)
	if err1 != nil || err2 != nil || q <= 0 || p <= 0 {
		return 0
	}
	return max(1, int(q/p+0.5))
}

func (m *Meter) memory(s *Metrics) {
	const kib = 1 << 10
	total, _ := m.field("/proc/meminfo", "MemTotal:")
	s.MemTotal = total * kib
	const v2, v1 = "/sys/fs/cgroup/", "/sys/fs/cgroup/memory/"
	if used, ok := m.number(v2 + "memory.current"); ok {
		s.MemCache, _ = m.field(v2+"memory.stat", "file")
		s.MemUsed = max(0, used-s.MemCache)
		if limit, ok := m.number(v2 + "memory.max"); ok && limit < s.MemTotal {
			s.MemTotal = limit
		}
		return
	}
	if used, ok := m.number(v1 + "memory.usage_in_bytes"); ok {
		s.MemCache, _ = m.field(v1+"memory.stat", "total_cache")
		s.MemUsed = max(0, used-s.MemCache)
		if limit, ok := m.number(v1 + "memory.limit_in_bytes"); ok && limit < s.MemTotal {
			s.MemTotal = limit
		}
		return
	}
	available, _ := m.field("/proc/meminfo", "MemAvailable:")
	cached, _ := m.field("/proc/meminfo", "Cached:")
	s.MemUsed = max(0, total-available) * kib
	s.MemCache = cached * kib
}

func (m *Meter) read(path string) string {
	text, err := os.ReadFile(m.root + path)
	if err != nil {
		return ""
	}
	return string(text)
}

func (m *Meter) has(path string) bool {
	_, err := os.Stat(m.root + path)
	return err == nil
}

func (m *Meter) number(path string) (int64, bool) {
	n, err := strconv.ParseInt(strings.TrimSpace(m.read(path)), 10, 64)
	return n, err == nil
}

// field finds the number after key in a file of `key value` lines.
func (m *Meter) field(path, key string) (int64, bool) {
	for line := range strings.SplitSeq(m.read(path), "\n") {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == key {
			n, err := strconv.ParseInt(f[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
