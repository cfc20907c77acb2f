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
	Alive        bool       `json:"alive"`
	Level        page.Level `json:"level"`
	Score        float64    `json:"score"`
	Admit        float64    `json:"admit"`
	OldestWaitNs int64      `json:"oldest_age_ns"`
	TimeToFullNs *int64     `json:"time_to_full_ns"`
	RetryAfterMs int64      `json:"retry_after_ms"`
	Load         float64    `json:"load"`
	CPU          float64    `json:"cpu"`
	PID          uint32     `json:"pid"`
	Worst        uint32     `json:"worst"`
	Concurrency  *uint32    `json:"concurrency"`
	MaxWaitNs    *int64     `json:"max_queue_wait_ns"`
	Entries      []entry    `json:"entries"`
}

type entry struct {
	Kind       string  `json:"kind"`
	ID         uint32  `json:"id"`
	Depth      uint32  `json:"depth"`
	Limit      *uint32 `json:"limit"`
	MinDelayNs int64   `json:"standing_delay_ns"`
	P99Ns      *int64  `json:"p99_ns"`
	HeadAgeNs  int64   `json:"oldest_age_ns"`
	Score      float64 `json:"score"`
	Arrivals   *uint32 `json:"arrivals_per_s"`
	Departures *uint32 `json:"departures_per_s"`
	Losses     uint32  `json:"losses"`
}

// nullUnless it is known.
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
		Alive:        p.Alive,
		Level:        p.Level,
		Score:        p.Score,
		Admit:        p.Admit,
		OldestWaitNs: int64(p.OldestAge),
		TimeToFullNs: nullUnless(p.TimeToFull != page.Never, int64(p.TimeToFull)),
		RetryAfterMs: int64(p.RetryAfter / time.Millisecond),
		Load:         p.Load,
		CPU:          p.CPU,
		PID:          p.PID,
		Worst:        p.Worst,
		Concurrency:  nullUnless(p.Concurrency != 0, p.Concurrency),
		MaxWaitNs:    nullUnless(p.MaxQueueWait != 0, int64(p.MaxQueueWait)),
		Entries:      []entry{},
	}
	for _, e := range tailback.Entries() {
		out.Entries = append(out.Entries, entry{
			Kind:       e.Kind.String(),
			ID:         e.ID,
			Depth:      e.Depth,
			Limit:      nullUnless(e.Flags&page.HasLimit != 0, e.Limit),
			MinDelayNs: int64(e.StandingDelay),
			P99Ns:      nullUnless(e.Flags&page.HasP99 != 0, int64(e.P99)),
			HeadAgeNs:  int64(e.OldestAge),
			Score:      e.Score,
			Arrivals:   nullUnless(e.Flags&page.HasRates != 0, e.Arrivals),
			Departures: nullUnless(e.Flags&page.HasRates != 0, e.Departures),
			Losses:     e.Losses,
		})
	}
	// Only numbers and closed lists of names: this cannot fail to encode.
	_ = json.NewEncoder(os.Stdout).Encode(out)
}
