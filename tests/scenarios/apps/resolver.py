"""A resolver for every name: resolver.py ADDRESS. After SIGUSR1 it answers no query, after SIGUSR2 it does again."""

import signal
import socket
import sys

answers = True


def turn(value):
    global answers
    answers = value


signal.signal(signal.SIGUSR1, lambda *_: turn(False))
signal.signal(signal.SIGUSR2, lambda *_: turn(True))
socket_ = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket_.bind((sys.argv[1], 53))
print("listening", flush=True)
while True:
    query, client = socket_.recvfrom(2048)
    if not answers:
        continue
    question = query[12 : query.index(b"\0", 12) + 5]
    # 127.0.0.1 for A (RFC 1035, 3.2.2), nothing for the other types.
    address = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4\x7f\0\0\1" if question[-4:-2] == b"\0\1" else b""
    counts = b"\0\1" + (b"\0\1" if address else b"\0\0") + b"\0\0\0\0"
    socket_.sendto(query[:2] + b"\x81\x80" + counts + question + address, client)
