/* A server of several processes that share a table in memory, under a robust mutex. Each request briefly holds it.
 *
 * shared PORT WORKERS: a keeper process, which serves nobody, holds it from SIGUSR1 to SIGUSR2.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t *table;
static volatile sig_atomic_t trouble;

static void on_signal(int number) { trouble = number == SIGUSR1; }

static void pause_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void lock(void)
{
    if (pthread_mutex_lock(table) == EOWNERDEAD)
        pthread_mutex_consistent(table);
}

static void keep(void)
{
    printf("keeper %d\n", getpid());
    fflush(stdout);
    for (;;) {
        if (trouble) {
            lock();
            while (trouble)
                pause_ms(50);
            pthread_mutex_unlock(table);
        }
        pause_ms(5);
    }
}

static void serve(int listener)
{
    static const char answer[] = "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n";
    char request[4096];
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0)
            continue;
        if (read(client, request, sizeof request) > 0) {
            lock();
            pause_ms(2);
            pthread_mutex_unlock(table);
            if (write(client, answer, sizeof answer - 1) < 0)
                perror("answer");
        }
        close(client);
    }
}

int main(int count, char **words)
{
    int yes = 1, workers = count == 3 ? atoi(words[2]) : 0;
    pthread_mutexattr_t shared;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    table = mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_init(&shared);
    pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&shared, PTHREAD_MUTEX_ROBUST);
    if (table == MAP_FAILED || pthread_mutex_init(table, &shared))
        return 2;
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 400)) {
        perror("listen");
        return 2;
    }
    for (int i = 0; i <= workers; i++)
        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            i ? serve(listener) : keep();
        }
    for (;;)
        pause();
}
