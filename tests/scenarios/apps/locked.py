"""A service with a thread for each request, which makes a call: locked.py PORT CALLED. SIGUSR1 makes it hold a lock over the
call, SIGUSR2 ends that.
"""

import contextlib
import queue
import signal
import socket
import sys
import threading

port, called = map(int, sys.argv[1:])
lock = threading.Lock()
held = False
free = queue.LifoQueue()


def turn(number, _):
    global held
    held = number == signal.SIGUSR1


def connect():
    server = socket.create_connection(("127.0.0.1", called))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server


def ask():
    try:
        server = free.get_nowait()
    except queue.Empty:
        server = connect()
    server.sendall(b"?")
    server.recv(1)
    free.put(server)


def serve(client):
    with client:
        if client.recv(4096):
            with lock if held else contextlib.nullcontext():
                ask()
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, turn)
listener = socket.create_server(("127.0.0.1", port), backlog=400)
print("listening", flush=True)
while True:
    client, _ = listener.accept()
    threading.Thread(target=serve, args=(client,), daemon=True).start()
