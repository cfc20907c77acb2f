//go:build !linux

package page

// No agent runs on these systems, so there is no page.
func mapFile(string, *mapping) *mapping { return nothing }

func bootClock() uint64 { return 0 }
