// Package logs keeps the agent's structured log: JSON lines on stdout and a
// bounded ring in memory that the node reads by cursor. Neither can block the
// agent or grow without end.
package logs

import (
	"encoding/json"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds of the ring; whichever is reached first drops the oldest entries.
const (
	maxEntries = 5000
	maxBytes   = 4 << 20
	// maxField bounds one field's value, so that a command's output cannot push everything else out.
	maxField = 1024
)

// Entry is one event. Level is debug, info, warn or error.
type Entry struct {
	Seq       uint64            `json:"seq"`
	Timestamp string            `json:"timestamp"` // RFC 3339 with nanoseconds
	Level     string            `json:"level"`
	Logger    string            `json:"logger"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields,omitempty"`
}

func (e *Entry) size() int {
	n := 96 + len(e.Message)
	for k, v := range e.Fields {
		n += len(k) + len(v) + 32
	}
	return n
}

// Log is safe for concurrent use. A nil Log drops everything.
type Log struct {
	mu    sync.Mutex
	ring  []Entry // ordered by Seq
	bytes int
	next  uint64
	out   chan Entry
	least int // level of what goes to out
}

var rank = map[string]int{"debug": 0, "info": 1, "warn": 2, "error": 3}

// New returns a log that writes lines of that level and above to w, from a
// goroutine of its own: a reader that stopped reading costs lines, not the
// agent. The ring keeps every level.
func New(w io.Writer, least string) *Log {
	l := &Log{next: 1, least: rank[least]}
	if w != nil {
		l.out = make(chan Entry, 256)
		go func() {
			enc := json.NewEncoder(w)
			for e := range l.out {
				_ = enc.Encode(e)
			}
		}()
	}
	return l
}

// Debug, Info, Warn and Error record an event; kv are field names and values in turn.
func (l *Log) Debug(logger, message string, kv ...string) { l.add("debug", logger, message, kv) }

// Info: see Debug.
func (l *Log) Info(logger, message string, kv ...string) { l.add("info", logger, message, kv) }

// Warn: see Debug.
func (l *Log) Warn(logger, message string, kv ...string) { l.add("warn", logger, message, kv) }

// Error: see Debug.
func (l *Log) Error(logger, message string, kv ...string) { l.add("error", logger, message, kv) }

func (l *Log) add(level, logger, message string, kv []string) {
	if l == nil {
		return
	}
	e := Entry{
		Timestamp: time.Now().UTC().Format(time.RFC3339Nano),
		Level:     level, Logger: logger, Message: message,
	}
	if len(kv) > 1 {
		e.Fields = make(map[string]string, len(kv)/2)
		for i := 0; i+1 < len(kv); i += 2 {
			e.Fields[kv[i]] = clip(kv[i+1])
		}
	}
	l.mu.Lock()
	e.Seq = l.next
	l.next++
	l.ring = append(l.ring, e)
	l.bytes += e.size()
	drop := 0
	for drop < len(l.ring)-1 && (len(l.ring)-drop > maxEntries || l.bytes > maxBytes) {
		l.bytes -= l.ring[drop].size()
		drop++
	}
	if drop > 0 {
		clear(l.ring[:drop]) // let go of the strings; the array itself is reused by append's growth
		l.ring = l.ring[drop:]
	}
	out := l.out
	l.mu.Unlock()
	if out != nil && rank[level] >= l.least {
		select {
		case out <- e:
		default:
		}
	}
}

// After returns up to limit entries with Seq > cursor, oldest first, and the
// cursor to ask with next. A cursor from before a restart (too high) starts over.
func (l *Log) After(cursor uint64, limit int) ([]Entry, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cursor >= l.next {
		cursor = 0
	}
	from := len(l.ring)
	if from > 0 && cursor < l.ring[from-1].Seq {
		first := l.ring[0].Seq
		from = 0
		if cursor >= first {
			from = int(cursor - first + 1)
		}
	}
	got := l.ring[from:]
	if limit > 0 && len(got) > limit {
		got = got[:limit]
	}
	if len(got) == 0 {
		return []Entry{}, cursor
	}
	return append([]Entry(nil), got...), got[len(got)-1].Seq
}

// clip makes a value valid UTF-8 and at most maxField bytes long.
func clip(s string) string {
	cut := len(s)
	if cut > maxField {
		cut = maxField
	}
	v := strings.ToValidUTF8(s[:cut], "\uFFFD")
	if cut < len(s) {
		v += "... (" + strconv.Itoa(len(s)-cut) + " bytes more)"
	}
	return v
}
