package filesystem

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"

	"connectrpc.com/connect"

	pb "emberbox/agent/gen/filesystem"
	"emberbox/agent/internal/watch"
)

// maxPending bounds what a watcher keeps for a caller that does not ask; the oldest events go first.
const maxPending = 10_000

// pending is a watcher whose events wait to be fetched.
type pending struct {
	watcher *watch.Watcher

	mu     sync.Mutex
	events []*pb.FilesystemEvent
	lost   int
}

func (p *pending) collect() {
	for e := range p.watcher.Events {
		p.mu.Lock()
		p.events = append(p.events, e)
		if over := len(p.events) - maxPending; over > 0 {
			clear(p.events[:over])
			p.events = p.events[over:]
			p.lost += over
		}
		p.mu.Unlock()
	}
}

func (p *pending) take() ([]*pb.FilesystemEvent, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	events, lost := p.events, p.lost
	p.events, p.lost = nil, 0
	return events, lost
}

// CreateWatcher starts a watcher that is asked for its events.
func (s *Service) CreateWatcher(_ context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, err := s.watch(req.Header(), req.Msg)
	if err != nil {
		return nil, err
	}
	p := &pending{watcher: w}
	go p.collect()
	id := "w" + rand.Text()
	s.mu.Lock()
	s.watchers[id] = p
	s.mu.Unlock()
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents returns what happened since it was last called.
func (s *Service) GetWatcherEvents(_ context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	id := req.Msg.GetWatcherId()
	s.mu.Lock()
	p := s.watchers[id]
	s.mu.Unlock()
	if p == nil {
		return nil, noWatcher(id)
	}
	events, lost := p.take()
	if lost > 0 {
		s.log.Warn("filesystem", "watch events dropped: not fetched in time", "watcher", id, "count", fmt.Sprint(lost))
	}
	return connect.NewResponse(&pb.GetWatcherEventsResponse{Events: events}), nil
}

// RemoveWatcher ends a watcher.
func (s *Service) RemoveWatcher(_ context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	id := req.Msg.GetWatcherId()
	s.mu.Lock()
	p := s.watchers[id]
	delete(s.watchers, id)
	s.mu.Unlock()
	if p == nil {
		return nil, noWatcher(id)
	}
	p.watcher.Close()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

func noWatcher(id string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
}
