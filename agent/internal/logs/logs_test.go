package logs

import (
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

func TestPagesMeetExactly(t *testing.T) {
	l := New(nil, "debug")
	for range 25 {
		l.Info("t", "m")
	}

	var seen []uint64
	cursor := uint64(0)
	for {
		page, next := l.After(cursor, 7)
		if len(page) == 0 {
			break
		}
		for _, e := range page {
			seen = append(seen, e.Seq)
		}
		cursor = next
	}

	if len(seen) != 25 || seen[0] != 1 || seen[24] != 25 {
		t.Errorf("seen %v", seen)
	}
}

func TestTheRingIsBounded(t *testing.T) {
	l := New(nil, "debug")
	for range maxEntries + 500 {
		l.Info("t", "m")
	}
	page, _ := l.After(0, 0)
	if len(page) != maxEntries || page[0].Seq != 501 {
		t.Errorf("%d entries from %d", len(page), page[0].Seq)
	}

	big := strings.Repeat("x", maxField)
	for range 6000 {
		l.Info("t", "m", "a", big, "b", big)
	}
	if l.bytes > maxBytes {
		t.Errorf("%d bytes kept", l.bytes)
	}
	page, _ = l.After(0, 0)
	total := 0
	for i := range page {
		total += page[i].size()
	}
	if total != l.bytes {
		t.Errorf("counted %d, are %d", l.bytes, total)
	}
}

func TestAStrangeCursorStartsOver(t *testing.T) {
	l := New(nil, "debug")
	l.Info("t", "m")
	if page, next := l.After(1<<60, 10); len(page) != 1 || next != 1 {
		t.Errorf("%v %d", page, next)
	}
	if page, next := l.After(1, 10); len(page) != 0 || next != 1 {
		t.Errorf("%v %d", page, next)
	}
}

func TestFieldsAreClippedAndValid(t *testing.T) {
	l := New(nil, "debug")
	l.Info("t", "m", "data", strings.Repeat("\xff", 5000))
	page, _ := l.After(0, 1)
	v := page[0].Fields["data"]
	if !utf8.ValidString(v) || !strings.HasSuffix(v, "(3976 bytes more)") {
		t.Errorf("%q", v)
	}
}

type stuck struct{ enter chan struct{} }

func (s stuck) Write(p []byte) (int, error) { <-s.enter; return len(p), nil }

func TestAReaderThatStoppedDoesNotBlock(t *testing.T) {
	w := stuck{make(chan struct{})}
	defer close(w.enter)
	l := New(w, "debug")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				l.Debug("t", "m")
			}
		})
	}
	wg.Wait()
	if page, _ := l.After(0, 0); len(page) != 4000 {
		t.Errorf("%d kept", len(page))
	}
}
