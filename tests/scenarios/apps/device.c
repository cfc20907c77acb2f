/* Stands in for the library of an accelerator's driver: waits for a device that takes this many milliseconds, as drivers do
   by default. It spins. */

#include <time.h>

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

void synchronize(double ms)
{
    double end = now_ms() + ms;
    while (now_ms() < end)
        for (volatile int spins = 0; spins < 20000; spins++)
            ;
}
