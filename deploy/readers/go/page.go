// Package page reads how full this service's queues are, and how much new work it should admit.
//
//	var tailback = page.Open("/run/tailback/shop/page") // need not exist yet
//
//	if !tailback.ShouldAdmit() { // tens of nanoseconds, no system call; or ShouldAdmitFrom(connection)
//		w.Header().Set("Retry-After", tailback.Pressure().RetryAfterHeader())
//		w.WriteHeader(http.StatusServiceUnavailable)
//		return
//	}
//
// Tailback writes one page of memory about ten times a second; this package maps and reads it. Everything fails open: no
// page, a page of a dead agent, or an invalid page mean no pressure (level 0, admit ratio 1). So does any system other than
// Linux.
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

// Never is the longest duration: the TimeToFull of a service whose queues are not filling.
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

// Kind of a queue, by its number in the page. A number is never reused.
type Kind uint16

func (k Kind) String() string {
	return nameOf(uint32(k), "syn", "accept", "recv", "udp", "unix", "pipe", "inflight", "workers", "eventloop",
		"runqueue", "lock", "disk", "memory", "downstream", "send", "fd", "uring", "app")
}

func nameOf(number uint32, names ...string) string {
	if number < uint32(len(names)) {
		return names[number]
	}
	return "unknown"
}

// Pressure on the service as a whole.
type Pressure struct {
	Alive      bool // an agent publishes for the service; if not, all other fields mean no pressure
	Level      Level
	Score      float64       // saturation of the worst queue: 0 is none, 1 is saturated; may exceed 1
	AdmitRatio float64       // fraction of new work to admit, 0 to 1
	OldestAge  time.Duration // age of the oldest item waiting
	TimeToFull time.Duration // forecast; Never if no queue is filling
	RetryAfter time.Duration // when rejected clients should retry
	Load       float64       // demand as a fraction of capacity: 1 is all of it, 2 is twice that or more
	CPU        float64       // CPU time used, as a fraction of what the service may use
	PID        uint32        // of the service, in the agent's /proc
	Worst      uint32        // index of the worst queue among the entries

	ConcurrencyLimit uint32        // most requests to have in service at once; 0: no limit
	MaxQueueWait     time.Duration // reject work that waited longer before it was dequeued; 0: no limit
}

var noPressure = Pressure{AdmitRatio: 1, TimeToFull: Never}

// RetryAfterHeader returns the value of a Retry-After header: whole seconds, rounded up, at least 1.
func (p Pressure) RetryAfterHeader() string {
	return strconv.Itoa(int(max(1, math.Ceil(p.RetryAfter.Seconds()))))
}

// Flags of an Entry. An unknown value is 0 and its flag is not set.
type Flags uint16

const (
	HasLimit Flags = 1 << iota
	HasRates
	HasP99
	Inbound // work enters the service through this queue, so it counts for AdmitRatio
)

// Entry is one queue.
type Entry struct {
	Kind           Kind
	Flags          Flags
	ID             uint32 // identifies the queue for as long as it exists
	Depth          uint32
	Limit          uint32        // if HasLimit
	StandingDelay  time.Duration // minimum delay over the last second or so
	P99            time.Duration // if HasP99
	OldestAge      time.Duration // age of the oldest item waiting
	Score          float64
	ArrivalsPerS   uint32 // if HasRates
	DeparturesPerS uint32 // if HasRates
	Losses         uint32 // work lost since the queue was first observed
}

const (
	pageBytes   = 4096
	headerBytes = 128
	entryBytes  = 64
	maxEntries  = (pageBytes - headerBytes) / entryBytes
	seqWord     = 2    // index of the seqlock word: odd while the agent writes
	maxReads    = 1000 // without yielding, because other goroutines wait for the one that reads; a write takes about a microsecond
	ppm         = 1_000_000
)

// words of a mapped page. They are loaded atomically, because another process writes them.
type words [pageBytes / 8]uint64

// mapping is unmapped when nothing refers to it any more, and not before, because a goroutine may still be reading. That is why
// Page has no Close method.
type mapping struct {
	*words
	file any // the file at the path when it was mapped, to notice when the path refers to another one
}

func (m *mapping) seq() uint64 { return atomic.LoadUint64(&m.words[seqWord]) }

// read makes a consistent copy of the page and returns it with its seq. If the agent stays in the middle of a write (it may have
// been stopped or killed there), it returns the seq of the last attempt and nil.
func (m *mapping) read() (seq uint64, copied *[pageBytes]byte) {
	copied = new([pageBytes]byte)
	for i := 0; i < maxReads; i++ {
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

// nothing stands in for a missing page and blank for its bytes, so that the fast path needs no check for one.
var (
	nothing = &mapping{words: new(words)}
	blank   = new([pageBytes]byte)
)

// view is the state of the page at the last read. It is immutable and replaced as a whole.
type view struct {
	*mapping
	lastSeq  uint64           // seq of the page at the last read
	recheck  time.Duration    // since start: when to read again even if seq is unchanged, because the page may be stale
	copy     *[pageBytes]byte // the last consistent copy
	admitPPM uint64
	pressure Pressure
}

var start = time.Now()

// Page of one target. It may be used by many goroutines at once.
type Page struct {
	path   string
	view   atomic.Pointer[view]
	credit atomic.Uint64 // sum of the admit ratios of all decisions, parts per million

	refreshing sync.Mutex
	reopen     time.Duration // since start
}

// Open never fails: a page that does not exist is looked for once a second.
func Open(path string) *Page {
	p := &Page{path: path}
	p.view.Store(&view{mapping: nothing, copy: blank})
	p.credit.Store(uint64(rand.Int63n(ppm))) // a random phase, so that processes do not reject in step
	return p
}

// AdmitRatio returns the fraction of new work to admit, 0 to 1.
func (p *Page) AdmitRatio() float64 { return p.poll().pressure.AdmitRatio }

// ShouldAdmit reports whether to admit this piece of work, by the admit ratio. Admissions are evenly spaced, not random: at 0.75,
// three are admitted, then one is rejected.
func (p *Page) ShouldAdmit() bool { return p.byRatio(p.poll()) }

// ShouldAdmitFrom reports whether to admit a request that was just read from this TCP connection. While the page has a max queue
// wait, it asks the kernel how long the request waited. Otherwise, and if the service itself terminates TLS, the admit ratio
// decides.
func (p *Page) ShouldAdmitFrom(connection net.Conn) bool {
	v := p.poll()
	if v.pressure.MaxQueueWait == 0 {
		return p.byRatio(v)
	}
	return p.byWait(v, Waited(connection))
}

// ShouldAdmitAfter reports whether to admit work that waited this long before it was dequeued. If that is Unknown, or the page has
// no max queue wait, the admit ratio decides.
func (p *Page) ShouldAdmitAfter(waited time.Duration) bool { return p.byWait(p.poll(), waited) }

func (p *Page) byWait(v *view, waited time.Duration) bool {
	limit := v.pressure.MaxQueueWait
	if limit == 0 || waited < 0 {
		return p.byRatio(v)
	}
	return waited <= limit
}

func (p *Page) byRatio(v *view) bool {
	ratio := v.admitPPM
	if ratio == ppm {
		return true
	}
	// One is admitted whenever the sum passes a multiple of one million.
	sum := p.credit.Add(ratio)
	return sum/ppm != (sum-ratio)/ppm
}

// Unknown stands for an unknown wait.
const Unknown = time.Duration(-1)

// Waited returns how long ago data last arrived on a TCP connection, by the kernel's clock, to a few milliseconds. Right after a
// request was read, that is how long it waited. It is Unknown for anything but a connection as a TCP listener accepted it. Do not
// pass the result of a tls.Conn's NetConn: the handshake arrived last, so the wait is about 0.
func Waited(connection net.Conn) time.Duration {
	if socket, ok := connection.(syscall.Conn); ok {
		return waited(socket)
	}
	return Unknown
}

// Pressure returns the pressure on the service as a whole.
func (p *Page) Pressure() Pressure { return p.poll().pressure }

// Entries returns the queues, worst first; none without a live page.
func (p *Page) Entries() []Entry {
	v := p.poll()
	if !v.pressure.Alive {
		return nil
	}
	entries := make([]Entry, min(binary.LittleEndian.Uint32(v.copy[12:]), maxEntries))
	for i := range entries {
		entries[i] = decodeEntry(v.copy[headerBytes+entryBytes*i:])
	}
	return entries
}

func (p *Page) poll() *view {
	v := p.view.Load()
	fresh := v.seq() == v.lastSeq && time.Since(start) < v.recheck
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
		if now >= p.reopen {
			p.reopen = now + time.Second
			if m := mapFile(p.path, v.mapping); m != v.mapping {
				// 1 is odd, so it differs from the seq of any consistent page.
				v = (&view{mapping: m, lastSeq: 1, copy: blank}).next(now)
			}
		}
		if !v.pressure.Alive {
			v.recheck = p.reopen
		}
	}
	p.view.Store(v)
	return v
}

// next reads the page if it changed. If the agent stays in the middle of a write, the last copy applies until its time to live is
// over.
func (v *view) next(now time.Duration) *view {
	next := &view{mapping: v.mapping, lastSeq: v.lastSeq, copy: v.copy, admitPPM: ppm, pressure: noPressure}
	if v.seq() != v.lastSeq {
		// The seq is stored even after a failed read, so that a page whose writer died is not read again and again.
		seq, copied := v.read()
		if next.lastSeq = seq; copied != nil {
			next.copy = copied
		}
	}
	runtime.KeepAlive(v.mapping)
	if ttlLeft := ttlLeft(next.copy[:]); ttlLeft > 0 {
		next.recheck = now + min(ttlLeft, time.Second)
		next.pressure = decodePressure(next.copy[:])
		next.admitPPM = uint64(math.Round(next.pressure.AdmitRatio * ppm))
	}
	return next
}

// ttlLeft returns the remaining time to live of a page; 0: invalid or stale.
func ttlLeft(b []byte) time.Duration {
	if string(b[:8]) != "TAILBACK" || binary.LittleEndian.Uint32(b[8:]) != 1 {
		return 0
	}
	published, ttl := binary.LittleEndian.Uint64(b[24:]), binary.LittleEndian.Uint64(b[32:])
	// Unsigned: a page from the future (written in another time namespace) counts as stale.
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
		AdmitRatio: float64(min(u32(b[52:]), ppm)) / ppm,
		OldestAge:  duration(u64(b[64:])),
		TimeToFull: duration(u64(b[72:])),
		RetryAfter: time.Duration(u32(b[80:])) * time.Millisecond,
		Load:       float64(u32(b[84:])) / ppm,
		CPU:        float64(u32(b[88:])) / ppm,
		PID:        u32(b[40:]),
		Worst:      u32(b[56:]),

		ConcurrencyLimit: u32(b[92:]),
		MaxQueueWait:     duration(u64(b[96:])),
	}
}

func decodeEntry(b []byte) Entry {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	return Entry{
		Kind:           Kind(binary.LittleEndian.Uint16(b)),
		Flags:          Flags(binary.LittleEndian.Uint16(b[2:])),
		ID:             u32(b[4:]),
		Depth:          u32(b[8:]),
		Limit:          u32(b[12:]),
		StandingDelay:  duration(u64(b[16:])),
		P99:            duration(u64(b[24:])),
		OldestAge:      duration(u64(b[32:])),
		Score:          float64(u32(b[40:])) / ppm,
		ArrivalsPerS:   u32(b[44:]),
		DeparturesPerS: u32(b[48:]),
		Losses:         u32(b[52:]),
	}
}

func duration(ns uint64) time.Duration { return time.Duration(min(ns, uint64(Never))) }
