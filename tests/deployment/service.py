"""A service with workers that accept from one listener. Its work is limited by a CPU, by its memory, or by a disk.

Arguments: the kind of work, the port, the number of workers. It prints `listening` once it listens.
"""

import mmap
import os
import random
import socket
import sys
import time

KIND, PORT, WORKERS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
PAGE = 4096
TABLE_BYTES = 128 << 20
# Pages of the table that one request needs.
PAGES = 1500


def compute():
    """15 ms of CPU time."""
    end = time.process_time() + 0.015
    while time.process_time() < end:
        pass


def write():
    """A record that must reach the disk."""
    with open("/journal", "ab") as journal:
        journal.write(b"x" * PAGE)
        journal.flush()
        os.fsync(journal.fileno())


def map_table():
    """A file that every request reads at random places."""
    with open("/table", "wb") as table:
        for _ in range(TABLE_BYTES >> 20):
            table.write(os.urandom(1 << 20))
        table.flush()
        os.fsync(table.fileno())
    with open("/table", "rb") as table:
        mapped = mmap.mmap(table.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped


TABLE = map_table() if KIND == "look-up" else b""


def look_up():
    for _ in range(PAGES):
        TABLE[random.randrange(TABLE_BYTES // PAGE) * PAGE]


WORK = {"compute": compute, "write": write, "look-up": look_up}[KIND]
LISTENER = socket.socket()
LISTENER.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
LISTENER.bind(("127.0.0.1", PORT))
LISTENER.listen(64)
for _ in range(WORKERS - 1):
    if os.fork() == 0:
        break
else:
    print("listening", flush=True)
while True:
    client, _ = LISTENER.accept()
    client.recv(PAGE)
    WORK()
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    client.close()
