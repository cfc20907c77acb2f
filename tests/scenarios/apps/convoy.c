/* A small threaded server. Each request briefly holds a lock, which a keeper thread shares.
 *
 * convoy PORT MODE THREADS: SIGUSR1 starts the fault, SIGUSR2 ends it.
 *   compute     the keeper holds the lock while computing for 400 ms at a time
 *   call=PORT   the keeper holds the lock while waiting for a reply from the Redis on PORT
 *   deadlock    the keeper and a second thread take two locks in opposite order
 *   heavy       each request computes for 100 ms instead of 2, without the lock
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER, journal = PTHREAD_MUTEX_INITIALIZER;
static volatile sig_atomic_t trouble;
static const char *mode;
static int listener;
static volatile unsigned long sink;

static void on_signal(int number) { trouble = number == SIGUSR1; }

static void compute(long ms)
{
    struct timespec from, now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
    do {
        for (int i = 0; i < 20000; i++)
            sink += i;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    } while ((now.tv_sec - from.tv_sec) * 1000 + (now.tv_nsec - from.tv_nsec) / 1000000 < ms);
}

static void pause_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void call(int port)
{
    static int redis = -1;
    char answer[256];
    if (redis < 0) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        redis = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(redis, (struct sockaddr *)&to, sizeof to))
            exit(3);
    }
    if (write(redis, "GET greeting\r\n", 14) != 14 || read(redis, answer, sizeof answer) <= 0)
        exit(4);
}

static void *keeper(void *unused)
{
    printf("keeper %ld\n", syscall(SYS_gettid));
    fflush(stdout);
    for (;;) {
        if (!trouble) {
            pause_ms(5);
            continue;
        }
        pthread_mutex_lock(&table);
        if (!strcmp(mode, "compute"))
            compute(400);
        else if (!strncmp(mode, "call=", 5))
            call(atoi(mode + 5));
        else if (!strcmp(mode, "deadlock")) {
            pause_ms(50);
            pthread_mutex_lock(&journal);
            pthread_mutex_unlock(&journal);
        }
        pthread_mutex_unlock(&table);
        pause_ms(2);
    }
    return unused;
}

static void *writer(void *unused)
{
    printf("writer %ld\n", syscall(SYS_gettid));
    fflush(stdout);
    for (;;) {
        if (!trouble || strcmp(mode, "deadlock")) {
            pause_ms(5);
            continue;
        }
        pthread_mutex_lock(&journal);
        pause_ms(50);
        pthread_mutex_lock(&table);
        pthread_mutex_unlock(&table);
        pthread_mutex_unlock(&journal);
    }
    return unused;
}

static void *worker(void *unused)
{
    static const char answer[] = "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n";
    char request[4096];
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0)
            continue;
        if (read(client, request, sizeof request) > 0) {
            if (!strcmp(mode, "heavy"))
                compute(trouble ? 100 : 2);
            pthread_mutex_lock(&table);
            pause_ms(2);
            pthread_mutex_unlock(&table);
            if (write(client, answer, sizeof answer - 1) < 0)
                perror("answer");
        }
        close(client);
    }
    return unused;
}

int main(int count, char **words)
{
    int yes = 1, threads = atoi(words[3]);
    pthread_t thread;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    mode = words[2];
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    signal(SIGPIPE, SIG_IGN);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 400)) {
        perror("listen");
        return 2;
    }
    pthread_create(&thread, NULL, keeper, NULL);
    pthread_create(&thread, NULL, writer, NULL);
    for (int i = 0; i < threads; i++)
        pthread_create(&thread, NULL, worker, NULL);
    for (;;)
        pause();
}
