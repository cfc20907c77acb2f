/* A service of WORKERS threads. Each one accepts a connection, decides as deploy/readers/c/examples/admit.c does, and works
 * for MS milliseconds. */
#include "tailback_page.h"

#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static int listener;
static const char *path;
static struct timespec work;

static int listen_on(const char *port)
{
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int yes = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 128) != 0) {
        perror("cannot listen");
        exit(1);
    }
    return fd;
}

static void *serve(void *nothing)
{
    struct tailback_page page; /* one per thread */
    tailback_open(&page, path);
    for (;;) {
        const int client = accept(listener, NULL, NULL);
        char request[4096];
        if (client >= 0 && read(client, request, sizeof request) > 0) {
            if (tailback_should_admit_from(&page, client)) {
                nanosleep(&work, NULL);
                dprintf(client, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\ndone\n");
            } else {
                dprintf(client,
                        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: %u\r\nContent-Length: 0\r\n"
                        "Connection: close\r\n\r\n",
                        tailback_retry_after_s(&page));
            }
        }
        close(client);
    }
    return nothing;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: %s PORT PAGE WORKERS MS\n", argv[0]);
        return 2;
    }
    listener = listen_on(argv[1]);
    path = argv[2];
    work.tv_nsec = atol(argv[4]) * 1000000; /* less than a second */
    signal(SIGPIPE, SIG_IGN);
    for (int worker = 1; worker < atoi(argv[3]); worker++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, NULL) != 0) {
            perror("cannot start a thread");
            return 1;
        }
    }
    serve(NULL);
}
