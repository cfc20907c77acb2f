/* Prints the page as one line of JSON.
 *
 *     cc -O2 -I.. -o dump dump.c && ./dump /run/tailback/shop/page
 */
#include "tailback_page.h"

#include <inttypes.h>
#include <stdio.h>

static void print_count(const char *name, uint64_t count, bool is_known)
{
    if (is_known)
        printf(",\"%s\":%" PRIu64, name, count);
    else
        printf(",\"%s\":null", name);
}

static void print_entry(const struct tailback_entry *entry)
{
    const bool has_rates = entry->flags & TAILBACK_HAS_RATES;
    printf("{\"kind\":\"%s\"", tailback_kind_name(entry->kind));
    print_count("id", entry->id, true);
    print_count("depth", entry->depth, true);
    print_count("limit", entry->limit, entry->flags & TAILBACK_HAS_LIMIT);
    print_count("standing_delay_ns", entry->standing_delay_ns, true);
    print_count("p99_ns", entry->p99_ns, entry->flags & TAILBACK_HAS_P99);
    print_count("oldest_age_ns", entry->oldest_age_ns, true);
    printf(",\"score\":%.6f", entry->score_ppm / 1e6);
    print_count("arrivals_per_s", entry->arrivals_per_s, has_rates);
    print_count("departures_per_s", entry->departures_per_s, has_rates);
    print_count("losses", entry->losses, true);
    putchar('}');
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s PATH\n", argv[0]);
        return 2;
    }
    struct tailback_page page;
    tailback_open(&page, argv[1]);
    const struct tailback_snapshot pressure = tailback_pressure(&page);
    struct tailback_entry entries[TAILBACK_ENTRIES_MAX];
    const size_t count = tailback_entries(&page, entries);

    printf("{\"alive\":%s", pressure.alive ? "true" : "false");
    print_count("level", pressure.level, true);
    printf(",\"score\":%.6f,\"admit_ratio\":%.6f", pressure.score, pressure.admit_ratio);
    print_count("oldest_age_ns", pressure.oldest_age_ns, true);
    print_count("time_to_full_ns", pressure.time_to_full_ns, pressure.time_to_full_ns != TAILBACK_NEVER);
    print_count("retry_after_ms", pressure.retry_after_ms, true);
    printf(",\"load\":%.6f,\"cpu\":%.6f", pressure.load, pressure.cpu);
    print_count("pid", pressure.pid, true);
    print_count("worst", pressure.worst, true);
    print_count("concurrency_limit", pressure.concurrency_limit, pressure.concurrency_limit != 0);
    print_count("max_queue_wait_ns", pressure.max_queue_wait_ns, pressure.max_queue_wait_ns != 0);
    printf(",\"entries\":[");
    for (size_t i = 0; i < count; i++) {
        if (i)
            putchar(',');
        print_entry(&entries[i]);
    }
    puts("]}");
    tailback_close(&page);
}
