/* tailback_page.h: how full are this service's queues, and how much new work should it admit?
 *
 *     static _Thread_local struct tailback_page page;      // one per thread
 *     tailback_open(&page, "/run/tailback/shop/page");     // need not exist yet
 *     if (!tailback_should_admit_from(&page, connection))  // or tailback_should_admit(&page): a few nanoseconds
 *         respond_503(tailback_retry_after_s(&page));
 *
 * Tailback writes one page of memory about ten times a second; this header maps and reads it. Everything fails open: no
 * page, a page of a dead agent, or an invalid page mean no pressure (level 0, admit ratio 1).
 *
 * A handle belongs to one thread, so its cache (4 KiB) needs no lock; the page itself is shared by all handles. A process that
 * forks must open its handles in the children, or all of them would reject in step.
 *
 * If this process itself terminates TLS, use tailback_should_admit(). The handshake precedes the request, so
 * tailback_should_admit_from() would admit everything, and a descriptor does not show that it carries TLS.
 *
 * C11 or C++17, GCC or Clang, 64-bit little-endian Linux. Strict modes (-std=c11) hide the system calls that it needs:
 * include it before system headers, or build with -D_DEFAULT_SOURCE.
 */
#ifndef TAILBACK_PAGE_H
#define TAILBACK_PAGE_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "the page is little-endian and read in whole 64-bit words"
#endif

/* ---- Results ---- */

#define TAILBACK_ENTRIES_MAX 62
#define TAILBACK_NEVER UINT64_MAX
#define TAILBACK_UNKNOWN UINT64_MAX

/* The pressure on the service as a whole. */
struct tailback_snapshot {
    bool alive;               /* an agent publishes for the service; if not, all other fields mean no pressure */
    uint32_t level;           /* 0 ok, 1 warn, 2 critical, 3 full */
    double score;             /* saturation of the worst queue: 0 is none, 1 is saturated; may exceed 1 */
    double admit_ratio;       /* fraction of new work to admit, 0 to 1 */
    uint64_t oldest_age_ns;   /* age of the oldest item waiting */
    uint64_t time_to_full_ns; /* forecast; TAILBACK_NEVER, the largest value, if no queue is filling */
    uint32_t retry_after_ms;  /* when rejected clients should retry */
    double load;              /* demand as a fraction of capacity: 1 is all of it, 2 is twice that or more */
    double cpu;               /* CPU time used, as a fraction of what the service may use */
    uint32_t pid;             /* of the service, in the agent's /proc */
    uint32_t worst;           /* index of the worst queue among the entries */
    uint32_t concurrency_limit; /* most requests to have in service at once; 0: no limit */
    uint64_t max_queue_wait_ns; /* reject work that waited longer before it was dequeued; 0: no limit */
};

/* Flags of an entry. An unknown value is 0 and its flag is not set. */
enum { TAILBACK_HAS_LIMIT = 1, TAILBACK_HAS_RATES = 2, TAILBACK_HAS_P99 = 4, TAILBACK_INBOUND = 8 };

/* One queue, as laid out in the page. */
struct tailback_entry {
    uint16_t kind; /* see tailback_kind_name() */
    uint16_t flags;
    uint32_t id; /* identifies the queue for as long as it exists */
    uint32_t depth;
    uint32_t limit;             /* valid if TAILBACK_HAS_LIMIT is set: 0 is a valid limit */
    uint64_t standing_delay_ns; /* minimum delay over the last second or so */
    uint64_t p99_ns;
    uint64_t oldest_age_ns; /* age of the oldest item waiting */
    uint32_t score_ppm;
    uint32_t arrivals_per_s;
    uint32_t departures_per_s;
    uint32_t losses; /* work lost since the queue was first observed */
    uint64_t reserved;
};

static inline const char *tailback_level_name(uint32_t level)
{
    static const char *const names[] = {"ok", "warn", "critical", "full"};
    return level < sizeof names / sizeof *names ? names[level] : "unknown";
}

/* The name of a queue's kind, by its number in the page. A number is never reused. */
static inline const char *tailback_kind_name(uint32_t kind)
{
    static const char *const names[] = {
        "syn", "accept", "recv", "udp", "unix", "pipe", "inflight", "workers", "eventloop",
        "runqueue", "lock", "disk", "memory", "downstream", "send", "fd", "uring", "app",
    };
    return kind < sizeof names / sizeof *names ? names[kind] : "unknown";
}

/* ---- The page ---- */

struct tailback_header_ {
    char magic[8];
    uint32_t version;
    uint32_t entries;
    uint64_t seq; /* odd while the agent writes */
    uint64_t published_ns;
    uint64_t ttl_ns;
    uint32_t pid;
    uint32_t level;
    uint32_t score_ppm;
    uint32_t admit_ppm;
    uint32_t worst;
    uint32_t wake; /* futex word, incremented on each level change */
    uint64_t oldest_age_ns;
    uint64_t time_to_full_ns;
    uint32_t retry_after_ms;
    uint32_t load_ppm;
    uint32_t cpu_ppm;
    uint32_t concurrency_limit;
    uint64_t max_queue_wait_ns;
    uint64_t reserved[3];
};

static_assert(sizeof(struct tailback_header_) == 128, "entries begin at 128");
static_assert(sizeof(struct tailback_entry) == 64, "an entry is one cache line");
static_assert(offsetof(struct tailback_header_, seq) == 16, "seq");
static_assert(offsetof(struct tailback_header_, pid) == 40, "pid");
static_assert(offsetof(struct tailback_header_, wake) == 60, "wake");
static_assert(offsetof(struct tailback_header_, retry_after_ms) == 80, "retry_after_ms");
static_assert(offsetof(struct tailback_header_, max_queue_wait_ns) == 96, "max_queue_wait_ns");
static_assert(offsetof(struct tailback_entry, standing_delay_ns) == 16, "standing_delay_ns");
static_assert(offsetof(struct tailback_entry, score_ppm) == 40, "score_ppm");

enum {
    TAILBACK_SEQ_ = 2, /* index of the seqlock word */
    TAILBACK_HEADER_WORDS_ = 16,
    TAILBACK_PAGE_WORDS_ = 512,
    TAILBACK_MAX_READ_ATTEMPTS_ = 1000, /* a write takes about a microsecond */
};

#define TAILBACK_PPM_ 1000000u
#define TAILBACK_SECOND_NS_ UINT64_C(1000000000)

/* Stands in for a missing page, so that the fast path needs no check for one. */
static const uint64_t tailback_no_page_[TAILBACK_HEADER_WORDS_] = {0};

struct tailback_page {
    const uint64_t *words;  /* the mapped page, or tailback_no_page_ */
    uint64_t seq;           /* seq of the page at the last read */
    uint64_t recheck_ns;    /* when to read again even if seq is unchanged: the page may be stale; CLOCK_MONOTONIC_COARSE */
    uint32_t admit_ppm;
    uint32_t credit_ppm; /* accumulated by tailback_should_admit(); 1000000 admits one */
    struct tailback_header_ last;
    uint64_t reopen_ns; /* when to try to open the page again, CLOCK_MONOTONIC_COARSE */
    const char *path;
    uint64_t copy[TAILBACK_PAGE_WORDS_]; /* of the whole page, from the last tailback_entries() */
};

static inline uint64_t tailback_clock_ns_(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * TAILBACK_SECOND_NS_ + (uint64_t)t.tv_nsec;
}

/* Makes a consistent copy of the first `count` words of the page. Returns the number of attempts; 0 if the agent stayed in the
 * middle of a write (it may have been stopped or killed there). copy[TAILBACK_SEQ_] is the seq of the last attempt. */
static inline unsigned tailback_read_(const uint64_t *words, uint64_t *copy, size_t count)
{
    uint64_t seq = 0;
    for (unsigned attempts = 1; attempts <= TAILBACK_MAX_READ_ATTEMPTS_; attempts++) {
        seq = __atomic_load_n(&words[TAILBACK_SEQ_], __ATOMIC_ACQUIRE);
        if (seq % 2 == 0) {
            for (size_t i = 0; i < count; i++)
                copy[i] = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
            __atomic_thread_fence(__ATOMIC_ACQUIRE); /* orders the loads above before the one below */
            if (__atomic_load_n(&words[TAILBACK_SEQ_], __ATOMIC_RELAXED) == seq)
                return attempts;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ __volatile__("yield");
#endif
    }
    copy[TAILBACK_SEQ_] = seq;
    return 0;
}

static inline void tailback_unmap_(struct tailback_page *page)
{
    if (page->words != tailback_no_page_)
        munmap((void *)(uintptr_t)page->words, sizeof(uint64_t) * TAILBACK_PAGE_WORDS_);
    page->words = tailback_no_page_;
    page->seq = 0;
    memset(&page->last, 0, sizeof page->last);
}

/* Maps the file at the path: the agent may have started since, or may have recreated the file. */
static inline void tailback_map_(struct tailback_page *page)
{
    tailback_unmap_(page);
    const size_t size = sizeof(uint64_t) * TAILBACK_PAGE_WORDS_;
    const int fd = open(page->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: opening a FIFO must not block */
    if (fd < 0)
        return;
    struct stat file;
    /* Reading beyond the end of a mapped file raises SIGBUS. */
    if (fstat(fd, &file) == 0 && S_ISREG(file.st_mode) && file.st_size >= (off_t)size) {
        void *mapped = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        if (mapped != MAP_FAILED) {
            page->words = (const uint64_t *)mapped;
            page->seq = 1; /* odd, so it differs from that of any consistent page */
        }
    }
    close(fd);
}

/* Remaining time to live of the page; 0: invalid or stale. */
static inline uint64_t tailback_ttl_left_ns_(const struct tailback_header_ *header)
{
    if (memcmp(header->magic, "TAILBACK", 8) != 0 || header->version != 1)
        return 0;
    /* Unsigned: a page from the future (written in another time namespace) counts as stale. */
    const uint64_t age_ns = tailback_clock_ns_(CLOCK_BOOTTIME) - header->published_ns;
    return age_ns < header->ttl_ns ? header->ttl_ns - age_ns : 0;
}

/* Reads the page if it changed; returns its remaining time to live. If the agent stays in the middle of a write, the last
 * values apply until their time to live is over. */
static inline uint64_t tailback_poll_(struct tailback_page *page)
{
    if (__atomic_load_n(&page->words[TAILBACK_SEQ_], __ATOMIC_RELAXED) != page->seq) {
        uint64_t copy[TAILBACK_HEADER_WORDS_];
        if (tailback_read_(page->words, copy, TAILBACK_HEADER_WORDS_))
            memcpy(&page->last, copy, sizeof page->last);
        page->seq = copy[TAILBACK_SEQ_]; /* also after a failed read, so that a page whose writer died is not read again and again */
    }
    return tailback_ttl_left_ns_(&page->last);
}

/* The slow path: seq has changed, or the page may be stale. */
__attribute__((noinline, cold, unused)) static void tailback_refresh_(struct tailback_page *page)
{
    const uint64_t now_ns = tailback_clock_ns_(CLOCK_MONOTONIC_COARSE);
    uint64_t ttl_left_ns = tailback_poll_(page);
    if (ttl_left_ns == 0 && now_ns >= page->reopen_ns) {
        page->reopen_ns = now_ns + TAILBACK_SECOND_NS_;
        tailback_map_(page);
        ttl_left_ns = tailback_poll_(page);
    }
    if (ttl_left_ns == 0) {
        memset(&page->last, 0, sizeof page->last);
        page->admit_ppm = TAILBACK_PPM_;
        page->recheck_ns = page->reopen_ns;
    } else {
        page->admit_ppm = page->last.admit_ppm < TAILBACK_PPM_ ? page->last.admit_ppm : TAILBACK_PPM_;
        page->recheck_ns = now_ns + (ttl_left_ns < TAILBACK_SECOND_NS_ ? ttl_left_ns : TAILBACK_SECOND_NS_);
    }
}

/* One load of a shared cache line and one read of a coarse clock, no system call. */
static inline void tailback_update_(struct tailback_page *page)
{
    if (__builtin_expect(__atomic_load_n(&page->words[TAILBACK_SEQ_], __ATOMIC_RELAXED) != page->seq ||
                             tailback_clock_ns_(CLOCK_MONOTONIC_COARSE) >= page->recheck_ns,
                         0))
        tailback_refresh_(page);
}

/* ---- API ---- */

/* Never fails: a page that does not exist is looked for once a second. The path is not copied and must stay valid. */
static inline void tailback_open(struct tailback_page *page, const char *path)
{
    memset(page, 0, sizeof *page);
    page->words = tailback_no_page_;
    page->path = path;
    /* A random phase, so that workers do not reject in step. */
    if (getrandom(&page->credit_ppm, sizeof page->credit_ppm, GRND_NONBLOCK) > 0)
        page->credit_ppm %= TAILBACK_PPM_;
    tailback_refresh_(page);
}

static inline void tailback_close(struct tailback_page *page)
{
    tailback_unmap_(page);
}

/* Fraction of new work to admit, 0 to 1. */
static inline double tailback_admit_ratio(struct tailback_page *page)
{
    tailback_update_(page);
    return page->admit_ppm / (double)TAILBACK_PPM_;
}

/* Whether to admit this piece of work, by the admit ratio. Admissions are evenly spaced, not random: at 0.75, three are
 * admitted, then one is rejected. */
static inline bool tailback_should_admit(struct tailback_page *page)
{
    tailback_update_(page);
    page->credit_ppm += page->admit_ppm;
    if (page->credit_ppm < TAILBACK_PPM_)
        return false;
    page->credit_ppm -= TAILBACK_PPM_;
    return true;
}

/* How long ago data last arrived on a TCP connection, by the kernel's clock, to a few milliseconds. Right after a request was
 * read, that is how long it waited. If this process terminates TLS, it is about 0, because the handshake arrived last.
 * TAILBACK_UNKNOWN if it is not a TCP connection. */
static inline uint64_t tailback_waited_ns(int connection)
{
    enum { TCP_ = 6, TCP_INFO_ = 11, LAST_DATA_RECV_MS_ = 13 }; /* <linux/tcp.h> and <netinet/tcp.h> exclude each other */
    uint32_t info[LAST_DATA_RECV_MS_ + 1];
    socklen_t length = sizeof info;
    if (getsockopt(connection, TCP_, TCP_INFO_, info, &length) != 0 || length != sizeof info)
        return TAILBACK_UNKNOWN;
    return UINT64_C(1000000) * info[LAST_DATA_RECV_MS_];
}

/* Whether to admit work that waited `waited_ns` before it was dequeued. If that is TAILBACK_UNKNOWN, or the page has no max
 * queue wait, the admit ratio decides. */
static inline bool tailback_should_admit_after(struct tailback_page *page, uint64_t waited_ns)
{
    tailback_update_(page);
    if (page->last.max_queue_wait_ns == 0 || waited_ns == TAILBACK_UNKNOWN)
        return tailback_should_admit(page);
    return waited_ns <= page->last.max_queue_wait_ns;
}

/* Whether to admit a request that was just read from this TCP connection. While the page has a max queue wait, this asks the
 * kernel how long the request waited; otherwise the admit ratio decides. Not if this process terminates TLS: see above. */
static inline bool tailback_should_admit_from(struct tailback_page *page, int connection)
{
    tailback_update_(page);
    const bool has_limit = page->last.max_queue_wait_ns != 0;
    return tailback_should_admit_after(page, has_limit ? tailback_waited_ns(connection) : TAILBACK_UNKNOWN);
}

static inline struct tailback_snapshot tailback_pressure(struct tailback_page *page)
{
    tailback_update_(page);
    const struct tailback_header_ *last = &page->last;
    struct tailback_snapshot pressure;
    pressure.alive = last->version != 0;
    pressure.level = last->level;
    pressure.score = last->score_ppm / (double)TAILBACK_PPM_;
    pressure.admit_ratio = page->admit_ppm / (double)TAILBACK_PPM_;
    pressure.oldest_age_ns = last->oldest_age_ns;
    pressure.time_to_full_ns = pressure.alive ? last->time_to_full_ns : TAILBACK_NEVER;
    pressure.retry_after_ms = last->retry_after_ms;
    pressure.load = last->load_ppm / (double)TAILBACK_PPM_;
    pressure.cpu = last->cpu_ppm / (double)TAILBACK_PPM_;
    pressure.pid = last->pid;
    pressure.worst = last->worst;
    pressure.concurrency_limit = last->concurrency_limit;
    pressure.max_queue_wait_ns = last->max_queue_wait_ns;
    return pressure;
}

/* The value of a Retry-After header: whole seconds, rounded up, at least 1. */
static inline uint32_t tailback_retry_after_s(struct tailback_page *page)
{
    const uint32_t ms = tailback_pressure(page).retry_after_ms;
    return ms <= 1000 ? 1 : (ms - 1) / 1000 + 1;
}

/* The queues, worst first, at most TAILBACK_ENTRIES_MAX. Returns how many; 0 without a live page. If the agent stays in the
 * middle of a write, the last entries apply until their time to live is over. */
static inline size_t tailback_entries(struct tailback_page *page, struct tailback_entry *entries)
{
    uint64_t copy[TAILBACK_PAGE_WORDS_];
    struct tailback_header_ header;
    tailback_update_(page);
    if (page->last.version == 0)
        return 0;
    const bool is_consistent = page->seq % 2 == 0; /* otherwise a read has just failed */
    if (is_consistent && tailback_read_(page->words, copy, TAILBACK_PAGE_WORDS_))
        memcpy(page->copy, copy, sizeof copy);
    memcpy(&header, page->copy, sizeof header);
    if (tailback_ttl_left_ns_(&header) == 0)
        return 0;
    const size_t count = header.entries < TAILBACK_ENTRIES_MAX ? header.entries : TAILBACK_ENTRIES_MAX;
    memcpy(entries, page->copy + TAILBACK_HEADER_WORDS_, count * sizeof *entries);
    return count;
}

/* Sleeps until the level differs from `level`, the timeout expires, or a signal arrives; returns the pressure then.
 *
 *     for (uint32_t level = 0;; level = tailback_wait(&page, level, 60000).level)
 *         ...
 */
static inline struct tailback_snapshot tailback_wait(struct tailback_page *page, uint32_t level, uint32_t timeout_ms)
{
    const uint64_t tick_ns = 10000000; /* the coarse clock is behind by up to this */
    const uint64_t end_ns = tailback_clock_ns_(CLOCK_MONOTONIC) + UINT64_C(1000000) * timeout_ms;
    for (;;) {
        const struct tailback_snapshot pressure = tailback_pressure(page);
        const uint64_t now_ns = tailback_clock_ns_(CLOCK_MONOTONIC);
        if (pressure.level != level || now_ns >= end_ns)
            return pressure;
        /* Bounded, because no one wakes the caller when an agent dies or starts. */
        const uint64_t until_ns = page->recheck_ns + tick_ns < end_ns ? page->recheck_ns + tick_ns : end_ns;
        const uint64_t sleep_ns = until_ns > now_ns ? until_ns - now_ns : 0;
        struct timespec sleep;
        sleep.tv_sec = (time_t)(sleep_ns / TAILBACK_SECOND_NS_);
        sleep.tv_nsec = (long)(sleep_ns % TAILBACK_SECOND_NS_);
        /* FUTEX_WAIT only reads the word, so a read-only shared mapping is enough; FUTEX_PRIVATE would not see the agent. */
        const char *wake = (const char *)page->words + offsetof(struct tailback_header_, wake);
        const long slept = pressure.alive ? syscall(SYS_futex, wake, FUTEX_WAIT, page->last.wake, &sleep, NULL, 0)
                                          : nanosleep(&sleep, NULL);
        if (slept != 0 && errno == EINTR)
            return tailback_pressure(page);
    }
}

#endif
