// Command tailback-page prints the page as one line of JSON.
//
//	go run ./cmd/tailback-page /run/tailback/shop/page
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"tailback.dev/page"
)

type line struct {
	Alive            bool       `json:"alive"`
	Level            page.Level `json:"level"`
	Score            float64    `json:"score"`
	AdmitRatio       float64    `json:"admit_ratio"`
	OldestAgeNs      int64      `json:"oldest_age_ns"`
	TimeToFullNs     *int64     `json:"time_to_full_ns"`
	RetryAfterMs     int64      `json:"retry_after_ms"`
	Load             float64    `json:"load"`
	CPU              float64    `json:"cpu"`
	PID              uint32     `json:"pid"`
	Worst            uint32     `json:"worst"`
	ConcurrencyLimit *uint32    `json:"concurrency_limit"`
	MaxQueueWaitNs   *int64     `json:"max_queue_wait_ns"`
	Entries          []entry    `json:"entries"`
}

type entry struct {
	Kind            string  `json:"kind"`
	ID              uint32  `json:"id"`
	Depth           uint32  `json:"depth"`
	Limit           *uint32 `json:"limit"`
	StandingDelayNs int64   `json:"standing_delay_ns"`
	P99Ns           *int64  `json:"p99_ns"`
	OldestAgeNs     int64   `json:"oldest_age_ns"`
	Score           float64 `json:"score"`
	ArrivalsPerS    *uint32 `json:"arrivals_per_s"`
	DeparturesPerS  *uint32 `json:"departures_per_s"`
	Losses          uint32  `json:"losses"`
}

// nullUnless returns null for a value that is not known.
func nullUnless[T any](known bool, value T) *T {
	if !known {
		return nil
	}
	return &value
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: tailback-page PATH")
		os.Exit(2)
	}
	tailback := page.Open(os.Args[1])
	p := tailback.Pressure()
	out := line{
		Alive:            p.Alive,
		Level:            p.Level,
		Score:            p.Score,
		AdmitRatio:       p.AdmitRatio,
		OldestAgeNs:      int64(p.OldestAge),
		TimeToFullNs:     nullUnless(p.TimeToFull != page.Never, int64(p.TimeToFull)),
		RetryAfterMs:     int64(p.RetryAfter / time.Millisecond),
		Load:             p.Load,
		CPU:              p.CPU,
		PID:              p.PID,
		Worst:            p.Worst,
		ConcurrencyLimit: nullUnless(p.ConcurrencyLimit != 0, p.ConcurrencyLimit),
		MaxQueueWaitNs:   nullUnless(p.MaxQueueWait != 0, int64(p.MaxQueueWait)),
		Entries:          []entry{},
	}
	for _, e := range tailback.Entries() {
		out.Entries = append(out.Entries, entry{
			Kind:            e.Kind.String(),
			ID:              e.ID,
			Depth:           e.Depth,
			Limit:           nullUnless(e.Flags&page.HasLimit != 0, e.Limit),
			StandingDelayNs: int64(e.StandingDelay),
			P99Ns:           nullUnless(e.Flags&page.HasP99 != 0, int64(e.P99)),
			OldestAgeNs:     int64(e.OldestAge),
			Score:           e.Score,
			ArrivalsPerS:    nullUnless(e.Flags&page.HasRates != 0, e.ArrivalsPerS),
			DeparturesPerS:  nullUnless(e.Flags&page.HasRates != 0, e.DeparturesPerS),
			Losses:          e.Losses,
		})
	}
	// Numbers and names from closed lists always encode.
	_ = json.NewEncoder(os.Stdout).Encode(out)
}
