"""Misbehaving or slow clients: caller.py HOST PORT COUNT ROLE PATH

non-sending  connects and never sends anything
silent       sends the headers of a request and never its body
non-reading  sends a request and never reads the response
kept         sends a request, reads the response and keeps the connection open
patient      requests repeatedly and reads as fast as the network delivers
"""

import socket
import sys
import threading
import time

host, port, count, role, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
kept = []


def connect():
    caller = socket.socket()
    if role == "non-reading":
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    caller.connect((host, port))
    return caller


def ask(method="GET", rest=""):
    return f"{method} {path} HTTP/1.0\r\nHost: x\r\n{rest}\r\n".encode()


def complete(caller):
    received = b""
    while b"\r\n\r\n" not in received:
        received += caller.recv(65536)
    head, body = received.split(b"\r\n\r\n", 1)
    lengths = [line.split(b":")[1] for line in head.splitlines() if line.lower().startswith(b"content-length:")]
    missing = int(lengths[0]) - len(body)
    while missing > 0:
        missing -= len(caller.recv(65536))


def patient():
    while True:
        with connect() as caller:
            caller.sendall(ask())
            while caller.recv(65536):
                pass


for _ in range(count):
    if role == "patient":
        threading.Thread(target=patient, daemon=True).start()
        continue
    caller = connect()
    if role == "kept":
        caller.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        complete(caller)
        kept.append(caller)
        continue
    if role == "non-sending":
        kept.append(caller)
        continue
    caller.sendall(ask("POST", "Content-Length: 1000\r\n") if role == "silent" else ask())
    kept.append(caller)
print("done", len(kept), flush=True)
while True:
    time.sleep(1)
