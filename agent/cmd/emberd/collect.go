package main

import _ "unsafe" // for go:linkname

// The runtime collects garbage when the last collection is two minutes ago,
// needed or not. A machine restored from memory that is older starts with one:
// it touches everything the agent has, before the first request is answered.
//
//go:linkname forceGCPeriod runtime.forcegcperiod
var forceGCPeriod int64

const never = 1<<63 - 1

// collectByNeedOnly turns that off; what the agent allocates still decides.
func collectByNeedOnly() { forceGCPeriod = never }
