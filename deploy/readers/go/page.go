// Package page says how full this service's queues are, and how much new work it should take.
//
//	var tailback = page.Open("/run/tailback/shop/page") // fine if it is not there yet
//
//	if !tailback.ShouldAdmit() { // tens of nanoseconds, no system call; or ShouldAdmitFrom(connection)
//		w.Header().Set("Retry-After", tailback.Pressure().RetryAfterHeader())
//		w.WriteHeader(http.StatusServiceUnavailable)
//		return
//	}
//
// Tailback writes one page of memory about ten times a second; this package maps it and reads it. Everything fails open:
// no page, a page of a dead agent, a page that makes no sense are "no pressure": level 0, admit 1. So it is, too, on
// systems other than Linux.
package page

import (
	"encoding/binary"
	"math"
	"math/rand"
	"net"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Never compares as longer than any time.
const Never = time.Duration(math.MaxInt64)

// Level of pressure, in ascending order.
type Level uint32

const (
	OK Level = iota
	Warn
	Critical
	Full
)

func (l Level) String() string { return nameOf(uint32(l), "ok", "warn", "critical", "full") }

// Kind of a queue, by its number in the page.
type Kind uint16

func (k Kind) String() string {
	return nameOf(uint32(k), "syn", "accept", "recv", "udp", "unix", "pipe", "inflight", "workers", "eventloop",
		"runqueue", "lock", "disk", "memory", "downstream", "send", "fd", "uring")
}

func nameOf(number uint32, names ...string) string {
	if number < uint32(len(names)) {
		return names[number]
	}
	return "unknown"
}

// Pressure on the service as a whole.
type Pressure struct {
	Alive      bool          // false: no agent speaks for this service now; all else is then "no pressure"
	Level      Level         //
	Score      float64       // of its fullest queue: 0 empty, 1 full; may pass 1
	Admit      float64       // share of new work to take, 0 to 1
	OldestAge time.Duration // age of the oldest work that waits
	TimeToFull time.Duration // forecast; may be Never
	RetryAfter time.Duration // when refused clients should come again
	Load       float64       // what is asked of the service, of what it can do: 1 is all of it, 2 twice that or more
	CPU        float64       // CPU time, of what the service may use
	PID        uint32        // of the service, as the agent's /proc numbers it
	Worst      uint32        // index of the fullest queue among the entries

	Concurrency uint32        // so many requests at once keep the service busy; 0: no limit
	MaxQueueWait     time.Duration // refuse what waited for longer before it was taken; 0: no limit
}

var noPressure = Pressure{Admit: 1, TimeToFull: Never}

// RetryAfterHeader is for the Retry-After of a refusal: whole seconds, rounded up, at least 1.
func (p Pressure) RetryAfterHeader() string {
	return strconv.Itoa(int(max(1, math.Ceil(p.RetryAfter.Seconds()))))
}

// Flags of an Entry. What is not known is 0, and its flag is not set.
type Flags uint16

const (
	HasLimit Flags = 1 << iota
	HasRates
	HasP99
	TakesWorkIn // and so counts for Admit
)

// Entry is one queue.
type Entry struct {
	Kind       Kind
	Flags      Flags
	ID         uint32 // names the queue as long as it is there
	Depth      uint32
	Limit      uint32        // if HasLimit
	StandingDelay   time.Duration // the delay that stands: no less for about a second
	P99        time.Duration // if HasP99
	OldestAge    time.Duration // of what has waited longest
	Score      float64
	Arrivals   uint32 // per second, if HasRates
	Departures uint32 // per second, if HasRates
	Losses     uint32 // since the queue is watched
}

const (
	pageBytes   = 4096
	headerBytes = 128
	entryBytes  = 64
	maxEntries  = (pageBytes - headerBytes) / entryBytes
	seqWord     = 2    // odd while the agent writes
	tries       = 1000 // without a break: other goroutines wait for the one that reads; writing takes a microsecond
	ppm         = 1_000_000
)

// words of a mapped page. Every one is loaded atomically: another process writes them.
type words [pageBytes / 8]uint64

// mapping is unmapped when nothing refers to it any more, and not before: a goroutine may still be reading. That is why
// a Page has no Close.
type mapping struct {
	*words
	file any // what the path named when it was mapped, to tell whether it names another file now
}

func (m *mapping) seq() uint64 { return atomic.LoadUint64(&m.words[seqWord]) }

// read copies the page as one whole. It returns the seq of the copy; or, if the agent was always in the middle of writing
// (it may have been stopped or killed there), that of the last try and nil.
func (m *mapping) read() (seq uint64, copied *[pageBytes]byte) {
	copied = new([pageBytes]byte)
	for i := 0; i < tries; i++ {
		if seq = m.seq(); seq%2 == 0 {
			for at := range m.words {
				binary.LittleEndian.PutUint64(copied[8*at:], atomic.LoadUint64(&m.words[at]))
			}
			if m.seq() == seq {
				return seq, copied
			}
		}
	}
	return seq, nil
}

// nothing stands in for a page that is not there, and blank for what it says: the fast path need not ask whether there is one.
var (
	nothing = &mapping{words: new(words)}
	blank   = new([pageBytes]byte)
)

// view is what is known of the page. It is never changed, only replaced as a whole.
type view struct {
	*mapping
	lastSeq   uint64           // of the page, when the rest of this was read
	lookAgain time.Duration    // since start: though seq is the same, the page may be stale by then
	copy      *[pageBytes]byte // the last good one
	admitPPM  uint64
	pressure  Pressure
}

var start = time.Now()

// Page of one target. It may be used by many goroutines at once.
type Page struct {
	path     string
	view     atomic.Pointer[view]
	diffused atomic.Uint64 // sum of all shares that ShouldAdmit was asked at

	refreshing sync.Mutex
	openAgain  time.Duration // since start
}

// Open never fails: a page that is not there is looked for again, at most once a second.
func Open(path string) *Page {
	p := &Page{path: path}
	p.view.Store(&view{mapping: nothing, copy: blank})
	p.diffused.Store(uint64(rand.Int63n(ppm))) // a random phase, so that many processes do not refuse in step
	return p
}

// Admit is the share of new work to take, 0 to 1.
func (p *Page) Admit() float64 { return p.look().pressure.Admit }

// ShouldAdmit says whether to take this piece of work. Not by lot: at a share of 0.75, three are taken and one is refused,
// in turn, so what is taken comes evenly spaced.
func (p *Page) ShouldAdmit() bool { return p.byShare(p.look()) }

// ShouldAdmitFrom says whether to take a request that was read from this TCP connection: by how long it waited before it is taken,
// which the kernel is asked for while the page says how long that may be. Else, and where the service itself speaks TLS, by the
// share.
func (p *Page) ShouldAdmitFrom(connection net.Conn) bool {
	v := p.look()
	if v.pressure.MaxQueueWait == 0 {
		return p.byShare(v)
	}
	return p.byWait(v, Waited(connection))
}

// ShouldAdmitAfter says whether to take a piece of work that waited for so long before: by that, while the page says how long
// it may be. Else, and where it is Unknown, by the share.
func (p *Page) ShouldAdmitAfter(waited time.Duration) bool { return p.byWait(p.look(), waited) }

func (p *Page) byWait(v *view, waited time.Duration) bool {
	most := v.pressure.MaxQueueWait
	if most == 0 || waited < 0 {
		return p.byShare(v)
	}
	return waited <= most
}

func (p *Page) byShare(v *view) bool {
	share := v.admitPPM
	if share == ppm {
		return true
	}
	// One is taken each time that the sum passes a whole.
	sum := p.diffused.Add(share)
	return sum/ppm != (sum-share)/ppm
}

// Unknown is how long something waited of which nobody knows.
const Unknown = time.Duration(-1)

// Waited is for how long what came last on a TCP connection is there, by the kernel's clock, to a few milliseconds. Asked when
// a request was read, that is how long it waited for it. Unknown for all but the connection that a TCP listener accepts: with
// TLS above it, the handshake came last. Do not give it what a tls.Conn's NetConn returns, for which this is about 0.
func Waited(connection net.Conn) time.Duration {
	if socket, ok := connection.(syscall.Conn); ok {
		return waited(socket)
	}
	return Unknown
}

// Pressure as it was published last.
func (p *Page) Pressure() Pressure { return p.look().pressure }

// Entries are the queues, the fullest first; none without a live page.
func (p *Page) Entries() []Entry {
	v := p.look()
	if !v.pressure.Alive {
		return nil
	}
	entries := make([]Entry, min(binary.LittleEndian.Uint32(v.copy[12:]), maxEntries))
	for i := range entries {
		entries[i] = decodeEntry(v.copy[headerBytes+entryBytes*i:])
	}
	return entries
}

func (p *Page) look() *view {
	v := p.view.Load()
	fresh := v.seq() == v.lastSeq && time.Since(start) < v.lookAgain
	runtime.KeepAlive(v.mapping)
	if fresh {
		return v
	}
	return p.refresh()
}

func (p *Page) refresh() *view {
	p.refreshing.Lock()
	defer p.refreshing.Unlock()
	now := time.Since(start)
	v := p.view.Load().next(now)
	if !v.pressure.Alive {
		if now >= p.openAgain {
			p.openAgain = now + time.Second
			if m := mapFile(p.path, v.mapping); m != v.mapping {
				// 1 is not the seq of any whole page: read it.
				v = (&view{mapping: m, lastSeq: 1, copy: blank}).next(now)
			}
		}
		if !v.pressure.Alive {
			v.lookAgain = p.openAgain
		}
	}
	p.view.Store(v)
	return v
}

// next reads the page if it changed. One that does not come to rest leaves the last good copy, while that is fresh.
func (v *view) next(now time.Duration) *view {
	next := &view{mapping: v.mapping, lastSeq: v.lastSeq, copy: v.copy, admitPPM: ppm, pressure: noPressure}
	if v.seq() != v.lastSeq {
		// The seq of a failed try is kept, too: a page whose writer died is not read again and again.
		seq, copied := v.read()
		if next.lastSeq = seq; copied != nil {
			next.copy = copied
		}
	}
	runtime.KeepAlive(v.mapping)
	if freshFor := freshFor(next.copy[:]); freshFor > 0 {
		next.lookAgain = now + min(freshFor, time.Second)
		next.pressure = decodePressure(next.copy[:])
		next.admitPPM = uint64(math.Round(next.pressure.Admit * ppm))
	}
	return next
}

// freshFor is how long a page may still be believed; 0: not at all.
func freshFor(b []byte) time.Duration {
	if string(b[:8]) != "TAILBACK" || binary.LittleEndian.Uint32(b[8:]) != 1 {
		return 0
	}
	published, ttl := binary.LittleEndian.Uint64(b[24:]), binary.LittleEndian.Uint64(b[32:])
	// Unsigned: a time yet to come is that of another clock (a time namespace, say), and stale.
	age := bootClock() - published
	if age >= ttl {
		return 0
	}
	return duration(ttl - age)
}

func decodePressure(b []byte) Pressure {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	return Pressure{
		Alive:      true,
		Level:      Level(u32(b[44:])),
		Score:      float64(u32(b[48:])) / ppm,
		Admit:      float64(min(u32(b[52:]), ppm)) / ppm,
		OldestAge: duration(u64(b[64:])),
		TimeToFull: duration(u64(b[72:])),
		RetryAfter: time.Duration(u32(b[80:])) * time.Millisecond,
		Load:       float64(u32(b[84:])) / ppm,
		CPU:        float64(u32(b[88:])) / ppm,
		PID:        u32(b[40:]),
		Worst:      u32(b[56:]),

		Concurrency: u32(b[92:]),
		MaxQueueWait:     duration(u64(b[96:])),
	}
}

func decodeEntry(b []byte) Entry {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	return Entry{
		Kind:       Kind(binary.LittleEndian.Uint16(b)),
		Flags:      Flags(binary.LittleEndian.Uint16(b[2:])),
		ID:         u32(b[4:]),
		Depth:      u32(b[8:]),
		Limit:      u32(b[12:]),
		StandingDelay:   duration(u64(b[16:])),
		P99:        duration(u64(b[24:])),
		OldestAge:    duration(u64(b[32:])),
		Score:      float64(u32(b[40:])) / ppm,
		Arrivals:   u32(b[44:]),
		Departures: u32(b[48:]),
		Losses:     u32(b[52:]),
	}
}

func duration(ns uint64) time.Duration { return time.Duration(min(ns, uint64(Never))) }
