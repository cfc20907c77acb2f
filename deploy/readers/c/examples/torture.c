/* Reads a page as fast as possible while another program writes it as fast as possible, and checks for torn reads.
 *
 *     cc -O2 -I.. -o torture torture.c && ./torture PAGE header|page READS
 *
 * The writer derives all fields from one number n: score_ppm and admit_ppm to n % 1000000; oldest_age_ns and time_to_full_ns
 * to n; retry_after_ms to n as u32; in each entry depth to n as u32, and standing_delay_ns, p99_ns and oldest_age_ns to n.
 *
 * `header` reads what tailback_pressure() needs, `page` also all entries. `unsettled` counts reads that gave up because the
 * writer was preempted in the middle of a write. Exits with 1 if a read was torn. With any other writer only the timings are
 * meaningful.
 */
#include "tailback_page.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static bool is_torn(const uint64_t *copy, size_t entries)
{
    struct tailback_header_ header;
    memcpy(&header, copy, sizeof header);
    const uint64_t n = header.oldest_age_ns;
    bool is_whole = header.score_ppm == n % 1000000 && header.admit_ppm == n % 1000000 && header.time_to_full_ns == n &&
                 header.retry_after_ms == (uint32_t)n;
    for (size_t i = 0; i < entries; i++) {
        struct tailback_entry entry;
        memcpy(&entry, copy + TAILBACK_HEADER_WORDS_ + 8 * i, sizeof entry);
        is_whole = is_whole && entry.depth == (uint32_t)n && entry.standing_delay_ns == n && entry.p99_ns == n &&
                entry.oldest_age_ns == n;
    }
    return !is_whole;
}

/* Waits up to a second, because the writer may be preempted in the middle of a write. */
static bool becomes_live(struct tailback_page *page)
{
    const struct timespec nap = {.tv_nsec = 1000000};
    for (int naps = 0; naps < 1000; naps++) {
        if (tailback_pressure(page).alive)
            return true;
        nanosleep(&nap, NULL);
    }
    return false;
}

int main(int argc, char **argv)
{
    const bool all = argc == 4 && strcmp(argv[2], "page") == 0;
    if (argc != 4 || (!all && strcmp(argv[2], "header") != 0)) {
        fprintf(stderr, "usage: %s PAGE header|page READS\n", argv[0]);
        return 2;
    }
    struct tailback_page page;
    tailback_open(&page, argv[1]);
    if (!becomes_live(&page)) {
        fprintf(stderr, "%s: no live page; start its writer first\n", argv[1]);
        return 2;
    }
    const size_t entries = all ? TAILBACK_ENTRIES_MAX : 0;
    const size_t words = all ? TAILBACK_PAGE_WORDS_ : TAILBACK_HEADER_WORDS_;
    const uint64_t reads = strtoull(argv[3], NULL, 10);
    uint64_t torn = 0, retries = 0, unsettled = 0;

    uint64_t start_ns = tailback_clock_ns_(CLOCK_MONOTONIC);
    for (uint64_t i = 0; i < reads; i++) {
        uint64_t copy[TAILBACK_PAGE_WORDS_];
        const unsigned attempts = tailback_read_(page.words, copy, words);
        if (attempts == 0) {
            unsettled++;
            continue;
        }
        retries += attempts - 1;
        torn += is_torn(copy, entries);
    }
    const double read_ns = (double)(tailback_clock_ns_(CLOCK_MONOTONIC) - start_ns);

    /* While the writer never pauses, each call reads the page again, so fewer calls are enough. */
    const uint64_t calls = reads < 20000000 ? reads : 20000000;
    double sum = 0; /* printed, so that the calls are not optimized away */
    start_ns = tailback_clock_ns_(CLOCK_MONOTONIC);
    for (uint64_t i = 0; i < calls; i++)
        sum += tailback_admit_ratio(&page);
    const double admit_ns = (double)(tailback_clock_ns_(CLOCK_MONOTONIC) - start_ns);

    printf("reads %" PRIu64 "  torn %" PRIu64 "  retries %" PRIu64 "  unsettled %" PRIu64 "  seconds %.2f\n", reads,
           torn, retries, unsettled, read_ns / 1e9);
    printf("%.1f ns per read  %.2f ns per admit_ratio()  (mean %.3f)\n", read_ns / (double)reads, admit_ns / (double)calls,
           sum / (double)calls);
    tailback_close(&page);
    return torn != 0;
}
