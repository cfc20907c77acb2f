/* Tests the reader on pages written here.
 *
 *     cc -I. -o /tmp/test test.c && /tmp/test
 */
#include "tailback_page.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: failed: %s\n", __func__, __LINE__, #condition);                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static char path[] = "/tmp/tailback-page-XXXXXX";

/* The page as an agent maps it; `page` and `entries` are the reader's. */
static struct {
    struct tailback_header_ header;
    struct tailback_entry entries[TAILBACK_ENTRIES_MAX];
} *written;
static struct tailback_page page;
static struct tailback_entry entries[TAILBACK_ENTRIES_MAX];

/* Writes a page (critical, admit nothing, one queue of depth 7) and opens a new reader. */
static void publish(uint64_t ttl_ns)
{
    memset(written, 0, sizeof *written);
    memcpy(written->header.magic, "TAILBACK", 8);
    written->header.version = 1;
    written->header.entries = 1;
    written->header.seq = 2;
    written->header.published_ns = tailback_clock_ns_(CLOCK_BOOTTIME);
    written->header.ttl_ns = ttl_ns;
    written->header.level = 2;
    written->header.load_ppm = 1500000;
    written->header.cpu_ppm = 250000;
    written->entries[0].depth = 7;
    tailback_close(&page);
    tailback_open(&page, path);
}

static void published_values_are_read(void)
{
    publish(100 * TAILBACK_SECOND_NS_);
    const struct tailback_snapshot pressure = tailback_pressure(&page);
    CHECK(pressure.alive && pressure.level == 2 && pressure.admit_ratio == 0);
    CHECK(pressure.load == 1.5 && pressure.cpu == 0.25);
    CHECK(!tailback_should_admit(&page));
    CHECK(tailback_entries(&page, entries) == 1 && entries[0].depth == 7);
    CHECK(strcmp(tailback_level_name(3), "full") == 0 && strcmp(tailback_level_name(4), "unknown") == 0);
}

static void if_the_agent_stalls_in_the_middle_of_a_write_the_last_values_apply_until_their_ttl(void)
{
    /* Longer than a busy machine pauses. */
    publish(3 * TAILBACK_SECOND_NS_);
    CHECK(tailback_entries(&page, entries) == 1);
    written->header.seq = 3;
    written->header.level = 0;
    written->entries[0].depth = 8;
    CHECK(tailback_pressure(&page).level == 2 && !tailback_should_admit(&page));
    CHECK(tailback_entries(&page, entries) == 1 && entries[0].depth == 7);
    sleep(3);
    usleep(20000); /* the coarse clock is behind by up to 10 ms */
    CHECK(!tailback_pressure(&page).alive && tailback_should_admit(&page) && tailback_entries(&page, entries) == 0);
    written->header.published_ns = tailback_clock_ns_(CLOCK_BOOTTIME);
    written->header.seq = 4;
    CHECK(tailback_pressure(&page).alive && tailback_entries(&page, entries) == 1 && entries[0].depth == 8);
}

static void magic_and_version_are_checked_at_each_read(void)
{
    publish(100 * TAILBACK_SECOND_NS_);
    CHECK(tailback_pressure(&page).alive);
    written->header.version = 2;
    written->header.seq = 4;
    CHECK(!tailback_pressure(&page).alive && tailback_should_admit(&page) && tailback_entries(&page, entries) == 0);
}

static void a_page_from_the_future_is_stale(void)
{
    publish(100 * TAILBACK_SECOND_NS_);
    written->header.published_ns += 10 * TAILBACK_SECOND_NS_;
    written->header.seq = 4;
    CHECK(!tailback_pressure(&page).alive);
}

/* Of any `window` consecutive requests, the exact share is admitted, rounded up or down. A ratio above 1 counts as 1, and each
 * ratio takes effect at once. */
static void admissions_are_evenly_spaced(void)
{
    enum { REQUESTS = 10000 };
    static const uint32_t ratios[] = {0, 1, 50000, 333333, 500000, 750000, 999999, 1000000, UINT32_MAX};
    static const uint64_t windows[] = {1, 2, 3, 7, 100, REQUESTS};
    static uint64_t admitted[REQUESTS + 1]; /* before each request */
    publish(100 * TAILBACK_SECOND_NS_);
    for (size_t r = 0; r < sizeof ratios / sizeof *ratios; r++) {
        written->header.admit_ppm = ratios[r];
        written->header.seq += 2;
        for (size_t i = 0; i < REQUESTS; i++)
            admitted[i + 1] = admitted[i] + tailback_should_admit(&page);
        const uint64_t ppm = ratios[r] < TAILBACK_PPM_ ? ratios[r] : TAILBACK_PPM_;
        for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
            const uint64_t least = windows[w] * ppm / TAILBACK_PPM_;
            const uint64_t most = (windows[w] * ppm + TAILBACK_PPM_ - 1) / TAILBACK_PPM_;
            for (size_t i = windows[w]; i <= REQUESTS; i++) {
                const uint64_t passed = admitted[i] - admitted[i - windows[w]];
                CHECK(least <= passed && passed <= most);
            }
        }
    }
}

static void pages_begin_with_different_phases(void)
{
    uint32_t phases[3];
    for (size_t i = 0; i < 3; i++) {
        publish(100 * TAILBACK_SECOND_NS_);
        phases[i] = page.credit_ppm;
        CHECK(phases[i] < TAILBACK_PPM_);
    }
    CHECK(phases[0] != phases[1] || phases[1] != phases[2]);
}

int main(void)
{
    const int file = mkstemp(path);
    CHECK(file >= 0 && ftruncate(file, sizeof *written) == 0);
    written = mmap(NULL, sizeof *written, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(written != MAP_FAILED);
    tailback_open(&page, path);
    published_values_are_read();
    if_the_agent_stalls_in_the_middle_of_a_write_the_last_values_apply_until_their_ttl();
    magic_and_version_are_checked_at_each_read();
    a_page_from_the_future_is_stale();
    admissions_are_evenly_spaced();
    pages_begin_with_different_phases();
    unlink(path);
}
