package page

import (
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Run with TAILBACK_PAGE=/run/tailback/shop/page go test -bench . Without the variable it measures a missing page.
func BenchmarkAdmitRatio(b *testing.B) {
	p := Open(os.Getenv("TAILBACK_PAGE"))
	for i := 0; i < b.N; i++ {
		p.AdmitRatio()
	}
}

const long = 100 * time.Second

// still is longer than a busy machine pauses.
const still = 3 * time.Second

// written is a page: critical, admit nothing, one queue of depth 7.
type written struct {
	*testing.T
	file *os.File
}

func write(t *testing.T, ttl time.Duration) written {
	file, err := os.Create(filepath.Join(t.TempDir(), "page"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	w := written{t, file}
	w.put(0, make([]byte, pageBytes))
	w.put(0, []byte("TAILBACK"))
	w.u32(8, 1)
	w.u32(12, 1)
	w.u64(16, 2)
	w.u64(24, bootClock())
	w.u64(32, uint64(ttl))
	w.u32(44, uint32(Critical))
	w.u32(84, 1_500_000)
	w.u32(88, 250_000)
	w.u32(128+8, 7)
	return w
}

func (w written) put(at int64, bytes []byte) {
	if _, err := w.file.WriteAt(bytes, at); err != nil {
		w.Fatal(err)
	}
}

func (w written) u32(at int64, value uint32) { w.put(at, binary.LittleEndian.AppendUint32(nil, value)) }
func (w written) u64(at int64, value uint64) { w.put(at, binary.LittleEndian.AppendUint64(nil, value)) }

// check fails the test unless the reader returns these values.
func (w written) check(p *Page, isAlive bool, level Level, depths ...uint32) {
	w.Helper()
	if pressure := p.Pressure(); pressure.Alive != isAlive || pressure.Level != level || p.ShouldAdmit() == isAlive {
		w.Errorf("pressure: %+v", pressure)
	}
	entries := p.Entries()
	if len(entries) != len(depths) || len(depths) > 0 && entries[0].Depth != depths[0] {
		w.Errorf("entries: %+v", entries)
	}
}

func TestPublishedValuesAreRead(t *testing.T) {
	w := write(t, long)
	p := Open(w.file.Name())
	w.check(p, true, Critical, 7)
	if pressure := p.Pressure(); pressure.Load != 1.5 || pressure.CPU != 0.25 {
		t.Errorf("pressure: %+v", pressure)
	}
	if Full.String() != "full" || (Full+1).String() != "unknown" {
		t.Errorf("%v, %v", Full, Full+1)
	}
}

func TestIfTheAgentStallsInTheMiddleOfAWriteTheLastValuesApplyUntilTheirTTL(t *testing.T) {
	w := write(t, still)
	p := Open(w.file.Name())
	w.check(p, true, Critical, 7)
	w.u64(16, 3)
	w.u32(44, uint32(OK))
	w.u32(128+8, 8)
	w.check(p, true, Critical, 7)
	time.Sleep(still)
	w.check(p, false, OK)
	w.u64(24, bootClock())
	w.u64(16, 4)
	w.check(p, true, OK, 8)
}

func TestMagicAndVersionAreCheckedAtEachRead(t *testing.T) {
	w := write(t, long)
	p := Open(w.file.Name())
	w.check(p, true, Critical, 7)
	w.u32(8, 2)
	w.u64(16, 4)
	w.check(p, false, OK)
}

func TestAPageFromTheFutureIsStale(t *testing.T) {
	w := write(t, long)
	w.u64(24, bootClock()+uint64(10*time.Second))
	w.check(Open(w.file.Name()), false, OK)
}

// ratio publishes this ratio, which an open reader notices.
func (w written) ratio(admitPPM uint32, seq uint64) {
	w.u32(52, admitPPM)
	w.u64(16, seq)
}

// exactShare returns how many of count requests may be admitted at this ratio: the exact share, rounded up or down.
func exactShare(count, admitPPM uint64) (least, most uint64) {
	sum := count * min(admitPPM, ppm)
	return sum / ppm, (sum + ppm - 1) / ppm
}

func TestAdmissionsAreEvenlySpaced(t *testing.T) {
	w := write(t, long)
	p := Open(w.file.Name())
	const requests = 10_000
	// A ratio above 1 counts as 1. Each one takes effect at once, and in every window of requests.
	for i, ratio := range []uint32{0, 1, 50_000, 333_333, 500_000, 750_000, 999_999, 1_000_000, math.MaxUint32} {
		w.ratio(ratio, uint64(4+2*i))
		sums := make([]uint64, requests+1) // admitted before each request
		for i := 0; i < requests; i++ {
			sums[i+1] = sums[i]
			if p.ShouldAdmit() {
				sums[i+1]++
			}
		}
		for _, window := range []int{1, 2, 3, 7, 100, requests} {
			least, most := exactShare(uint64(window), uint64(ratio))
			for end := window; end <= requests; end++ {
				if passed := sums[end] - sums[end-window]; passed < least || passed > most {
					t.Fatalf("%d of %d at %d", passed, window, ratio)
				}
			}
		}
	}
}

func TestGoroutinesShareTheRatioEvenly(t *testing.T) {
	w := write(t, long)
	w.ratio(300_001, 4)
	p := Open(w.file.Name())
	var passed atomic.Uint64
	var group sync.WaitGroup
	for i := 0; i < 4; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := 0; i < 25_000; i++ {
				if p.ShouldAdmit() {
					passed.Add(1)
				}
			}
		}()
	}
	group.Wait()
	if least, most := exactShare(100_000, 300_001); passed.Load() < least || passed.Load() > most {
		t.Errorf("%d of 100,000", passed.Load())
	}
}

func TestPagesBeginWithDifferentPhases(t *testing.T) {
	phases := map[uint64]bool{}
	for i := 0; i < 3; i++ {
		phases[Open("/nonexistent/page").credit.Load()] = true
	}
	if len(phases) == 1 {
		t.Error(phases)
	}
}

// All callers wait for the goroutine that reads, so it must not yield its CPU meanwhile.
func TestReadingAHalfWrittenPageGivesUpSoonThoughOtherGoroutinesCompute(t *testing.T) {
	w := write(t, long)
	p := Open(w.file.Name())
	w.check(p, true, Critical, 7)
	var isOver atomic.Bool
	defer isOver.Store(true)
	var begun sync.WaitGroup
	for i := 0; i < 2*runtime.GOMAXPROCS(0); i++ {
		begun.Add(1)
		go func() {
			begun.Done()
			for !isOver.Load() {
			}
		}()
	}
	begun.Wait()
	w.u64(16, 3)
	began := time.Now()
	p.ShouldAdmit()
	if took := time.Since(began); took > time.Second {
		t.Error(took)
	}
}
