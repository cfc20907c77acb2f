"""Answers each byte on a connection with a byte: called.py PORT MS SLOW_MS. After SIGUSR1 it takes SLOW_MS, after SIGUSR2 MS."""

import signal
import socket
import sys
import threading
import time

port, fast, slow = map(int, sys.argv[1:])
takes = fast


def turn(number, _):
    global takes
    takes = slow if number == signal.SIGUSR1 else fast


def serve(client):
    with client:
        while client.recv(1):
            time.sleep(takes / 1000)
            client.sendall(b"!")


for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, turn)
listener = socket.create_server(("127.0.0.1", port), backlog=400)
print("listening", flush=True)
while True:
    client, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(client,), daemon=True).start()
