"""A threaded Python service: threads.py PORT THREADS. SIGUSR1 starts six computing threads, SIGUSR2 ends them."""

import signal
import socket
import sys
import threading
import time

port, threads = map(int, sys.argv[1:])
listener = socket.create_server(("127.0.0.1", port), backlog=400)
trouble = threading.Event()


def compute():
    while trouble.is_set():
        sum(i * i for i in range(1000))


def begin(*_):
    trouble.set()
    for number in range(6):
        threading.Thread(target=compute, name=f"compute-{number}", daemon=True).start()


def serve():
    while True:
        client, _ = listener.accept()
        with client:
            request = client.recv(4096)
            for _ in range(10):
                time.sleep(0.001)
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n" if request else b"")


signal.signal(signal.SIGUSR1, begin)
signal.signal(signal.SIGUSR2, lambda *_: trouble.clear())
for number in range(threads):
    threading.Thread(target=serve, daemon=True).start()
print("listening", flush=True)
while True:
    time.sleep(1)
