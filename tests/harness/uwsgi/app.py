"""A typical service: it sleeps for its service time and makes sequential Redis calls, on one connection per worker."""

import os
import socket
import time

PORT = int(os.environ["APP_REDIS_PORT"])
CALLS = int(os.environ["APP_CALLS"])
WORK_S = float(os.environ["APP_WORK_MS"]) / 1000

redis = None


def call(*words):
    """Sends one Redis command (RESP) and returns its reply."""
    global redis
    if redis is None:
        redis = socket.create_connection(("127.0.0.1", PORT)).makefile("rwb")
    redis.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
    redis.flush()
    head = redis.readline()
    if not head.endswith(b"\r\n"):
        redis = None
        raise ConnectionError("Redis closed the connection")
    if head[:1] == b"$" and head != b"$-1\r\n":
        return redis.read(int(head[1:]) + 2)[:-2]
    return head[1:-2]


def application(environ, start_response):
    for _ in range(CALLS):
        call(b"GET", b"greeting")
    time.sleep(WORK_S)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello\n"]
