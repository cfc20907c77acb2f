/* Prints the page as one line of JSON.
 *
 *     cc -O2 -I.. -o dump dump.c && ./dump /run/tailback/shop/page
 */
#include "tailback_page.h"

#include <inttypes.h>
#include <stdio.h>

static void print_entry(const struct tailback_entry *entry)
{
    printf("{\"kind\":\"%s\",\"id\":%" PRIu32 ",\"depth\":%" PRIu32, tailback_kind_name(entry->kind), entry->id, entry->depth);
    if (entry->limit)
        printf(",\"limit\":%" PRIu32, entry->limit);
    else
        printf(",\"limit\":null");
    printf(",\"min_delay_ns\":%" PRIu64 ",\"p99_ns\":%" PRIu64 ",\"head_age_ns\":%" PRIu64, entry->min_delay_ns, entry->p99_ns,
           entry->head_age_ns);
    printf(",\"score\":%.6f,\"arrivals_per_s\":%" PRIu32 ",\"departures_per_s\":%" PRIu32 ",\"losses\":%" PRIu32 "}",
           entry->score_ppm / 1e6, entry->arrivals_per_s, entry->departures_per_s, entry->losses);
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

    printf("{\"alive\":%s,\"level\":%" PRIu32 ",\"score\":%.6f,\"admit\":%.6f", pressure.alive ? "true" : "false", pressure.level,
           pressure.score, pressure.admit);
    printf(",\"oldest_wait_ns\":%" PRIu64, pressure.oldest_wait_ns);
    if (pressure.time_to_full_ns == TAILBACK_NEVER)
        printf(",\"time_to_full_ns\":null");
    else
        printf(",\"time_to_full_ns\":%" PRIu64, pressure.time_to_full_ns);
    printf(",\"retry_after_ms\":%" PRIu32 ",\"pid\":%" PRIu32 ",\"worst\":%" PRIu32 ",\"entries\":[", pressure.retry_after_ms,
           pressure.pid, pressure.worst);
    for (size_t i = 0; i < count; i++) {
        if (i)
            putchar(',');
        print_entry(&entries[i]);
    }
    puts("]}");
    tailback_close(&page);
}
