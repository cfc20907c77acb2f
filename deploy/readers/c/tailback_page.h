/* tailback_page.h: how full are this service's queues, and how much new work should it take?
 *
 *     static _Thread_local struct tailback_page page;      // one for each thread that asks
 *     tailback_open(&page, "/run/tailback/shop/page");     // fine if it is not there yet
 *     if (!tailback_should_admit_from(&page, connection))  // or tailback_should_admit(&page): a few nanoseconds
 *         answer_503(tailback_retry_after_s(&page));
 *
 * Tailback writes one page of memory about ten times a second; this header maps it and reads it. Everything fails
 * open: no page, a page of a dead agent, a page that makes no sense are "no pressure": level 0, admit 1.
 *
 * A handle belongs to one thread: its cache (4 KiB) is then plain memory, and the page itself is shared by all anyway. A
 * process that forks opens its handles in the children, or all of them would refuse work in step.
 *
 * Where this process itself speaks TLS: tailback_should_admit(). A descriptor does not tell that there is TLS on it, and
 * by tailback_should_admit_from() everything would be admitted: the handshake came just before the request.
 *
 * C11 or C++17, GCC or Clang, 64-bit little-endian Linux. Strict modes (-std=c11) hide the system calls that it needs:
 * include it before the system's headers, or build with -D_DEFAULT_SOURCE.
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

/* ---- What a reader is told ---- */

#define TAILBACK_ENTRIES_MAX 62
#define TAILBACK_NEVER UINT64_MAX
#define TAILBACK_UNKNOWN UINT64_MAX

/* The service as a whole. */
struct tailback_snapshot {
    bool alive;               /* false: no agent speaks for this service now; all else is then "no pressure" */
    uint32_t level;           /* 0 ok, 1 warn, 2 critical, 3 full */
    double score;             /* of its fullest queue: 0 empty, 1 full; may pass 1 */
    double admit;             /* share of new work to take, 0 to 1 */
    uint64_t oldest_age_ns;  /* age of the oldest work that waits */
    uint64_t time_to_full_ns; /* forecast; TAILBACK_NEVER compares as longer than any time */
    uint32_t retry_after_ms;  /* when refused clients should come again */
    double load;              /* what is asked of the service, of what it can do: 1 is all of it, 2 twice that or more */
    double cpu;               /* CPU time, of what the service may use */
    uint32_t pid;             /* of the service, as the agent's /proc numbers it */
    uint32_t worst;           /* index of the fullest queue among the entries */
    uint32_t concurrency;     /* so many requests at once keep the service busy; 0: no limit */
    uint64_t max_queue_wait_ns;     /* refuse what waited for longer before it was taken; 0: no limit */
};

/* What is not known is 0, and its flag is not set. */
enum { TAILBACK_HAS_LIMIT = 1, TAILBACK_HAS_RATES = 2, TAILBACK_HAS_P99 = 4, TAILBACK_TAKES_WORK_IN = 8 };

/* One queue, as it stands in the page. */
struct tailback_entry {
    uint16_t kind; /* see tailback_kind_name() */
    uint16_t flags;
    uint32_t id; /* names the queue as long as it is there */
    uint32_t depth;
    uint32_t limit;        /* 0 may be one: its flag tells */
    uint64_t standing_delay_ns; /* the delay that stands: no less for about a second */
    uint64_t p99_ns;
    uint64_t oldest_age_ns; /* of what has waited longest */
    uint32_t score_ppm;
    uint32_t arrivals_per_s;
    uint32_t departures_per_s;
    uint32_t losses; /* since the queue is watched */
    uint64_t reserved;
};

static inline const char *tailback_level_name(uint32_t level)
{
    static const char *const names[] = {"ok", "warn", "critical", "full"};
    return level < sizeof names / sizeof *names ? names[level] : "unknown";
}

static inline const char *tailback_kind_name(uint32_t kind)
{
    static const char *const names[] = {
        "syn", "accept", "recv", "udp", "unix", "pipe", "inflight", "workers", "eventloop",
        "runqueue", "lock", "disk", "memory", "downstream", "send", "fd", "uring",
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
    uint32_t wake; /* futex word, raised on a level change */
    uint64_t oldest_age_ns;
    uint64_t time_to_full_ns;
    uint32_t retry_after_ms;
    uint32_t load_ppm;
    uint32_t cpu_ppm;
    uint32_t concurrency;
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
    TAILBACK_SEQ_ = 2, /* a word of the page */
    TAILBACK_HEADER_WORDS_ = 16,
    TAILBACK_PAGE_WORDS_ = 512,
    TAILBACK_TRIES_ = 1000,
};

#define TAILBACK_PPM_ 1000000u
#define TAILBACK_SECOND_NS_ UINT64_C(1000000000)

/* Stands in for a page that is not there, so that the fast path need not ask whether there is one. */
static const uint64_t tailback_no_page_[TAILBACK_HEADER_WORDS_] = {0};

struct tailback_page {
    const uint64_t *words;  /* the mapped page, or tailback_no_page_ */
    uint64_t seq;           /* of the page, when the rest of this was read */
    uint64_t look_again_ns; /* CLOCK_MONOTONIC_COARSE: though seq is the same, the page may be stale by then */
    uint32_t admit_ppm;
    uint32_t diffused_ppm; /* what tailback_should_admit() has saved up */
    struct tailback_header_ last;
    uint64_t open_again_ns;
    const char *path;
    uint64_t whole[TAILBACK_PAGE_WORDS_]; /* as tailback_entries() read it last */
};

static inline uint64_t tailback_clock_ns_(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * TAILBACK_SECOND_NS_ + (uint64_t)t.tv_nsec;
}

/* Copies the first `count` words of the page as one whole. Returns how many tries that took; 0 if the agent was always in
 * the middle of writing (it may have been stopped or killed there). copy[TAILBACK_SEQ_] is the seq of the last try. */
static inline unsigned tailback_read_(const uint64_t *words, uint64_t *copy, size_t count)
{
    uint64_t seq = 0;
    for (unsigned tries = 1; tries <= TAILBACK_TRIES_; tries++) {
        seq = __atomic_load_n(&words[TAILBACK_SEQ_], __ATOMIC_ACQUIRE);
        if (seq % 2 == 0) {
            for (size_t i = 0; i < count; i++)
                copy[i] = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
            __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the loads above come before the one below */
            if (__atomic_load_n(&words[TAILBACK_SEQ_], __ATOMIC_RELAXED) == seq)
                return tries;
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

/* Maps what the path names now: the agent may have started since, or have made the file anew. */
static inline void tailback_map_(struct tailback_page *page)
{
    tailback_unmap_(page);
    const size_t size = sizeof(uint64_t) * TAILBACK_PAGE_WORDS_;
    const int fd = open(page->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* never hang on a FIFO */
    if (fd < 0)
        return;
    struct stat file;
    /* Memory mapped beyond the end of a file is a SIGBUS to whoever reads it. */
    if (fstat(fd, &file) == 0 && S_ISREG(file.st_mode) && file.st_size >= (off_t)size) {
        void *mapped = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        if (mapped != MAP_FAILED) {
            page->words = (const uint64_t *)mapped;
            page->seq = 1; /* not that of any whole page: read it */
        }
    }
    close(fd);
}

/* For how long the page may still be believed; 0: not at all. */
static inline uint64_t tailback_fresh_for_ns_(const struct tailback_header_ *header)
{
    if (memcmp(header->magic, "TAILBACK", 8) != 0 || header->version != 1)
        return 0;
    /* Unsigned: a time yet to come is that of another clock (a time namespace, say), and stale. */
    const uint64_t age_ns = tailback_clock_ns_(CLOCK_BOOTTIME) - header->published_ns;
    return age_ns < header->ttl_ns ? header->ttl_ns - age_ns : 0;
}

/* Reads the page if it changed. One that does not come to rest leaves the last good values, while they are fresh. */
static inline uint64_t tailback_look_(struct tailback_page *page)
{
    if (__atomic_load_n(&page->words[TAILBACK_SEQ_], __ATOMIC_RELAXED) != page->seq) {
        uint64_t copy[TAILBACK_HEADER_WORDS_];
        if (tailback_read_(page->words, copy, TAILBACK_HEADER_WORDS_))
            memcpy(&page->last, copy, sizeof page->last);
        page->seq = copy[TAILBACK_SEQ_]; /* of the failed try, too: a page whose writer died is not read again and again */
    }
    return tailback_fresh_for_ns_(&page->last);
}

/* The slow path: seq has changed, or it is time to look again. */
__attribute__((noinline, cold, unused)) static void tailback_refresh_(struct tailback_page *page)
{
    const uint64_t now_ns = tailback_clock_ns_(CLOCK_MONOTONIC_COARSE);
    uint64_t fresh_for_ns = tailback_look_(page);
    if (fresh_for_ns == 0 && now_ns >= page->open_again_ns) {
        page->open_again_ns = now_ns + TAILBACK_SECOND_NS_;
        tailback_map_(page);
        fresh_for_ns = tailback_look_(page);
    }
    if (fresh_for_ns == 0) {
        memset(&page->last, 0, sizeof page->last);
        page->admit_ppm = TAILBACK_PPM_;
        page->look_again_ns = page->open_again_ns;
    } else {
        page->admit_ppm = page->last.admit_ppm < TAILBACK_PPM_ ? page->last.admit_ppm : TAILBACK_PPM_;
        page->look_again_ns = now_ns + (fresh_for_ns < TAILBACK_SECOND_NS_ ? fresh_for_ns : TAILBACK_SECOND_NS_);
    }
}

/* One load of a shared cache line and one look at a coarse clock, no system call. */
static inline void tailback_keep_fresh_(struct tailback_page *page)
{
    if (__builtin_expect(__atomic_load_n(&page->words[TAILBACK_SEQ_], __ATOMIC_RELAXED) != page->seq ||
                             tailback_clock_ns_(CLOCK_MONOTONIC_COARSE) >= page->look_again_ns,
                         0))
        tailback_refresh_(page);
}

/* ---- What a service calls ---- */

/* Never fails: a page that is not there is looked for again, at most once a second. The path is kept, not copied. */
static inline void tailback_open(struct tailback_page *page, const char *path)
{
    memset(page, 0, sizeof *page);
    page->words = tailback_no_page_;
    page->path = path;
    /* A random phase, so that many workers do not refuse in step. */
    if (getrandom(&page->diffused_ppm, sizeof page->diffused_ppm, GRND_NONBLOCK) > 0)
        page->diffused_ppm %= TAILBACK_PPM_;
    tailback_refresh_(page);
}

static inline void tailback_close(struct tailback_page *page)
{
    tailback_unmap_(page);
}

/* Share of new work to take, 0 to 1. */
static inline double tailback_admit(struct tailback_page *page)
{
    tailback_keep_fresh_(page);
    return page->admit_ppm / (double)TAILBACK_PPM_;
}

/* Whether to take this piece of work. Not by lot: at a share of 0.75, three are taken and one is refused, in turn, so what
 * is taken comes evenly spaced. */
static inline bool tailback_should_admit(struct tailback_page *page)
{
    tailback_keep_fresh_(page);
    page->diffused_ppm += page->admit_ppm;
    if (page->diffused_ppm < TAILBACK_PPM_)
        return false;
    page->diffused_ppm -= TAILBACK_PPM_;
    return true;
}

/* For how long what came last on a TCP connection is there, by the kernel's clock, to a few milliseconds. Asked when a
 * request was read, that is how long it waited for it; where this process itself speaks TLS, the handshake came last, and
 * this is about 0. TAILBACK_UNKNOWN for what is no TCP connection. */
static inline uint64_t tailback_waited_ns(int connection)
{
    enum { TCP_ = 6, TCP_INFO_ = 11, LAST_DATA_RECV_MS_ = 13 }; /* <linux/tcp.h> and <netinet/tcp.h> exclude each other */
    uint32_t info[LAST_DATA_RECV_MS_ + 1];
    socklen_t length = sizeof info;
    if (getsockopt(connection, TCP_, TCP_INFO_, info, &length) != 0 || length != sizeof info)
        return TAILBACK_UNKNOWN;
    return UINT64_C(1000000) * info[LAST_DATA_RECV_MS_];
}

/* Whether to take a piece of work that waited for so long before: by that, while the page says how long it may be. Else, and
 * where it is TAILBACK_UNKNOWN, by the share. */
static inline bool tailback_should_admit_after(struct tailback_page *page, uint64_t waited_ns)
{
    tailback_keep_fresh_(page);
    if (page->last.max_queue_wait_ns == 0 || waited_ns == TAILBACK_UNKNOWN)
        return tailback_should_admit(page);
    return waited_ns <= page->last.max_queue_wait_ns;
}

/* Whether to take a request that was read from this TCP connection, likewise: the kernel is asked how long it waited, while the page
 * says how long that may be. Not where this process itself speaks TLS: see above. */
static inline bool tailback_should_admit_from(struct tailback_page *page, int connection)
{
    tailback_keep_fresh_(page);
    const bool asks = page->last.max_queue_wait_ns != 0;
    return tailback_should_admit_after(page, asks ? tailback_waited_ns(connection) : TAILBACK_UNKNOWN);
}

static inline struct tailback_snapshot tailback_pressure(struct tailback_page *page)
{
    tailback_keep_fresh_(page);
    const struct tailback_header_ *last = &page->last;
    struct tailback_snapshot pressure;
    pressure.alive = last->version != 0;
    pressure.level = last->level;
    pressure.score = last->score_ppm / (double)TAILBACK_PPM_;
    pressure.admit = page->admit_ppm / (double)TAILBACK_PPM_;
    pressure.oldest_age_ns = last->oldest_age_ns;
    pressure.time_to_full_ns = pressure.alive ? last->time_to_full_ns : TAILBACK_NEVER;
    pressure.retry_after_ms = last->retry_after_ms;
    pressure.load = last->load_ppm / (double)TAILBACK_PPM_;
    pressure.cpu = last->cpu_ppm / (double)TAILBACK_PPM_;
    pressure.pid = last->pid;
    pressure.worst = last->worst;
    pressure.concurrency = last->concurrency;
    pressure.max_queue_wait_ns = last->max_queue_wait_ns;
    return pressure;
}

/* For the Retry-After of a refusal: whole seconds, rounded up, at least 1. */
static inline uint32_t tailback_retry_after_s(struct tailback_page *page)
{
    const uint32_t ms = tailback_pressure(page).retry_after_ms;
    return ms <= 1000 ? 1 : (ms - 1) / 1000 + 1;
}

/* The queues, the fullest first, at most TAILBACK_ENTRIES_MAX. Returns how many; 0 without a live page. Of a page that does
 * not come to rest, those that were read last, while they are fresh. */
static inline size_t tailback_entries(struct tailback_page *page, struct tailback_entry *entries)
{
    uint64_t copy[TAILBACK_PAGE_WORDS_];
    struct tailback_header_ header;
    tailback_keep_fresh_(page);
    if (page->last.version == 0)
        return 0;
    const bool at_rest = page->seq % 2 == 0; /* else it was just tried in vain */
    if (at_rest && tailback_read_(page->words, copy, TAILBACK_PAGE_WORDS_))
        memcpy(page->whole, copy, sizeof copy);
    memcpy(&header, page->whole, sizeof header);
    if (tailback_fresh_for_ns_(&header) == 0)
        return 0;
    const size_t count = header.entries < TAILBACK_ENTRIES_MAX ? header.entries : TAILBACK_ENTRIES_MAX;
    memcpy(entries, page->whole + TAILBACK_HEADER_WORDS_, count * sizeof *entries);
    return count;
}

/* Sleeps until the level is another than `level`, the time is over, or a signal came; returns the pressure by then.
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
        /* Nobody wakes us when the agent dies, or is born. */
        const uint64_t until_ns = page->look_again_ns + tick_ns < end_ns ? page->look_again_ns + tick_ns : end_ns;
        const uint64_t sleep_ns = until_ns > now_ns ? until_ns - now_ns : 0;
        struct timespec sleep;
        sleep.tv_sec = (time_t)(sleep_ns / TAILBACK_SECOND_NS_);
        sleep.tv_nsec = (long)(sleep_ns % TAILBACK_SECOND_NS_);
        /* FUTEX_WAIT only compares the word: a read-only mapping of a file will do, if it is not FUTEX_PRIVATE. */
        const char *wake = (const char *)page->words + offsetof(struct tailback_header_, wake);
        const long slept = pressure.alive ? syscall(SYS_futex, wake, FUTEX_WAIT, page->last.wake, &sleep, NULL, 0)
                                          : nanosleep(&sleep, NULL);
        if (slept != 0 && errno == EINTR)
            return tailback_pressure(page);
    }
}

#endif
