"""A resolver for every name: resolver.py ADDRESS MS. After SIGUSR1 it answers each query MS later (0: never), after SIGUSR2 at
once again.
"""

import signal
import socket
import sys
import threading

late_s = int(sys.argv[2]) / 1000
trouble = False


def turn(number, _):
    global trouble
    trouble = number == signal.SIGUSR1


signal.signal(signal.SIGUSR1, turn)
signal.signal(signal.SIGUSR2, turn)
socket_ = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket_.bind((sys.argv[1], 53))
print("listening", flush=True)
while True:
    query, client = socket_.recvfrom(2048)
    if trouble and not late_s:
        continue
    question = query[12 : query.index(b"\0", 12) + 5]
    # 127.0.0.1 for A (RFC 1035, 3.2.2), nothing for the other types.
    address = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4\x7f\0\0\1" if question[-4:-2] == b"\0\1" else b""
    counts = b"\0\1" + (b"\0\1" if address else b"\0\0") + b"\0\0\0\0"
    answer = query[:2] + b"\x81\x80" + counts + question + address
    if trouble:
        threading.Timer(late_s, socket_.sendto, (answer, client)).start()
    else:
        socket_.sendto(answer, client)
