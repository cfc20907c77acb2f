/* A server that sheds load as the page asks: it rejects requests at once with 503 and Retry-After.
 *
 *     cc -O2 -I.. -o admit admit.c && ./admit 8000 /run/tailback/shop/page
 */
#include "tailback_page.h"

#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

/* An IPv4 listener on all addresses; exits on failure. */
static int listen_on(const char *port)
{
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(port));
    const int yes = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 128) != 0) {
        perror("cannot listen");
        exit(1);
    }
    return listener;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s PORT PAGE\n", argv[0]);
        return 2;
    }
    const int listener = listen_on(argv[1]);
    signal(SIGPIPE, SIG_IGN); /* a client may disconnect before the response */

    struct tailback_page page;
    tailback_open(&page, argv[2]);
    for (;;) {
        const int client = accept(listener, NULL, NULL);
        char request[4096];
        /* Read first: closing a connection with unread data resets it, and the client never sees the response. */
        if (client >= 0 && read(client, request, sizeof request) > 0) {
            if (tailback_should_admit_from(&page, client))
                dprintf(client, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n");
            else
                dprintf(client,
                        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: %u\r\nContent-Length: 0\r\n"
                        "Connection: close\r\n\r\n",
                        tailback_retry_after_s(&page));
        }
        close(client);
    }
}
