package handler

import (
	"sync"

	pb "emberbox/agent/gen/process"
)

// queued is how many events a subscriber may lag behind before the process has
// to wait for it, as it would for a full pipe: 32 chunks are at most 1 MiB.
const queued = 32

// Subscription is one stream's view of a process, from when it subscribed.
type Subscription struct {
	// Events carries data events; it is closed after the last.
	Events <-chan *pb.ProcessEvent

	events chan *pb.ProcessEvent
	gone   chan struct{}
	once   sync.Once
	from   *broadcast
}

// Cancel ends the subscription; the process goes on without it.
func (s *Subscription) Cancel() {
	s.once.Do(func() {
		close(s.gone)
		s.from.remove(s)
	})
}

// broadcast hands every event to every subscriber, in order, losing none: a
// slow subscriber slows the process, an absent one does not.
type broadcast struct {
	send sync.Mutex // one sender at a time; close waits for it

	mu     sync.Mutex
	subs   map[*Subscription]struct{}
	closed bool
}

func newBroadcast() *broadcast { return &broadcast{subs: map[*Subscription]struct{}{}} }

func (b *broadcast) subscribe() *Subscription {
	events := make(chan *pb.ProcessEvent, queued)
	s := &Subscription{Events: events, events: events, gone: make(chan struct{}), from: b}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(events)
		return s
	}
	b.subs[s] = struct{}{}
	return s
}

func (b *broadcast) remove(s *Subscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.subs, s)
}

func (b *broadcast) publish(e *pb.ProcessEvent) {
	b.send.Lock()
	defer b.send.Unlock()
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return
	}
	subs := make([]*Subscription, 0, len(b.subs))
	for s := range b.subs {
		subs = append(subs, s)
	}
	b.mu.Unlock()
	for _, s := range subs {
		select {
		case s.events <- e:
		case <-s.gone:
		}
	}
}

// close ends every subscription after what was published; later publishes are dropped.
func (b *broadcast) close() {
	b.send.Lock()
	defer b.send.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for s := range b.subs {
		close(s.events)
	}
	clear(b.subs)
}
