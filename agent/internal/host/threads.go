package host

import (
	"runtime"
	"sync"
)

// PrepareThreads makes the Go runtime start n threads now and keep them. It
// starts threads when it needs them, and ends the program when it cannot get
// one: without spare threads, a fork bomb inside that meets the machine's
// process limit would take the agent, and with it the machine, along.
func PrepareThreads(n int) {
	var held, done sync.WaitGroup
	held.Add(n)
	done.Add(n)
	for range n {
		go func() {
			defer done.Done()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			held.Done()
			held.Wait() // every one holds a thread of its own until all do
		}()
	}
	done.Wait()
}
