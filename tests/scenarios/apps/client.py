"""A client that closes each connection after the answer, without waiting for the server to: client.py PORT REQUESTS_PER_S."""

import socket
import sys
import threading
import time

port, pause_s = int(sys.argv[1]), 1 / float(sys.argv[2])


def ask():
    try:
        with socket.create_connection(("127.0.0.1", port), 30) as server:
            server.sendall(b"GET / HTTP/1.0\r\n\r\n")
            server.recv(4096)
    except OSError:
        pass


print("ready", flush=True)
due = time.monotonic()
while True:
    threading.Thread(target=ask, daemon=True).start()
    due += pause_s
    time.sleep(max(0, due - time.monotonic()))
