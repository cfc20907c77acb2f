"""An HTTP/1.1 server and client that log the start of each request and of its response (ns since 1970).

    talk.py serve MODE WORK_MS [CERT KEY]          one thread per connection; prints `listening ADDRESS`
    talk.py load MODE PORT CONNECTIONS THINK_MS SECONDS [CERT]

MODE: plain, large, streamed, pipelined. `span BEGIN END` is one request. `hidden BEGIN END` is a request that was sent
before the response to an earlier one: sequence numbers do not show it.
"""

import random
import socket
import ssl
import sys
import threading
import time

LOCK = threading.Lock()


def log(*words):
    with LOCK:
        print(*words, flush=True)


def pause(mean_ms):
    time.sleep(random.uniform(0, 2 * mean_ms) / 1e3)


class Messages:
    """Reads messages (head and body) and the arrival time of the first byte of each."""

    def __init__(self, connection):
        self.connection = connection
        self.buffer = b""
        self.came_ns = 0

    def more(self):
        piece = self.connection.recv(65536)
        if not piece:
            raise EOFError
        if not self.buffer:
            self.came_ns = time.time_ns()
        self.buffer += piece

    def take(self):
        """Returns the time of the first byte, and whether it arrived together with an earlier message."""
        hidden = bool(self.buffer)
        while b"\r\n\r\n" not in self.buffer:
            self.more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        came_ns = self.came_ns
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(self.buffer) < length:
            self.more()
        self.buffer = self.buffer[length:]
        return came_ns, hidden


def respond(connection, mode):
    body = b"x" * (random.randrange(1, 400_000) if mode == "large" else 200)
    pieces = 5 if mode == "streamed" else 1
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) * pieces)
    responded_ns = time.time_ns()
    connection.sendall(head + body)
    for _ in range(1, pieces):
        time.sleep(0.1)
        connection.sendall(body)
    return responded_ns


def serve_one(connection, mode, work_ms, context):
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            connection = context.wrap_socket(connection, server_side=True)
        messages = Messages(connection)
        while True:
            began_ns, hidden = messages.take()
            pause(work_ms)
            log("hidden" if hidden else "span", began_ns, respond(connection, mode))
    except (EOFError, OSError):
        connection.close()


def serve(mode, work_ms, cert=None, key=None):
    context = None
    if cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    log("listening 127.0.0.1:%d" % listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(
            target=serve_one, args=(connection, mode, float(work_ms), context), daemon=True
        ).start()


def call(port, mode, think_ms, end, cert):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if cert:
        context = ssl.create_default_context(cafile=cert)
        context.check_hostname = False
        connection = context.wrap_socket(connection)
    messages = Messages(connection)
    depth = 3 if mode == "pipelined" else 1
    while time.time() < end:
        pause(think_ms)
        body = b"y" * (random.randrange(1, 150_000) if mode == "large" else 20)
        head = b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        began_ns = time.time_ns()
        connection.sendall((head + body) * depth)
        for number in range(depth):
            came_ns, _ = messages.take()
            log("hidden" if number else "span", began_ns, came_ns)
    connection.close()


def load(mode, port, connections, think_ms, seconds, cert=None):
    end = time.time() + float(seconds)
    threads = [
        threading.Thread(target=call, args=(int(port), mode, float(think_ms), end, cert))
        for _ in range(int(connections))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log("done")


{"serve": serve, "load": load}[sys.argv[1]](*sys.argv[2:])
