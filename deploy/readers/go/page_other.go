//go:build !linux

package page

// There is no agent here, so there is no page.
func mapFile(string, *mapping) *mapping { return nothing }

func bootClock() uint64 { return 0 }
