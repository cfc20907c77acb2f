"""A service of several processes that reads its data from a file: pages.py PORT WORKERS MODE FILE MIB. Each request reads a
thousand random pages: `mmap` of a mapping, `sqlite` of a table, a row each.
"""

import mmap
import os
import random
import socket
import sqlite3
import sys

port, workers, mode, path, mib = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
PAGE = 4096
READS = 1000
pages = mib * 1024 * 1024 // PAGE


def write_file():
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1024 * 1024))


def write_table():
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, data BLOB)")
    # Of each page of 4 kB, one row fits.
    database.executemany("INSERT INTO t VALUES (?, ?)", ((id, os.urandom(3000)) for id in range(pages)))
    database.commit()
    database.close()


def of_mapping():
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return lambda: sum(mapping[random.randrange(pages) * PAGE] for _ in range(READS))


def of_table():
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    database.execute("PRAGMA cache_size = 0")

    def work():
        for _ in range(READS):
            database.execute("SELECT data FROM t WHERE id = ?", (random.randrange(pages),)).fetchone()

    return work


def serve(listener):
    random.seed()
    work = {"mmap": of_mapping, "sqlite": of_table}[mode]()
    while True:
        client, _ = listener.accept()
        with client:
            if client.recv(4096):
                work()
                client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


{"mmap": write_file, "sqlite": write_table}[mode]()
listener = socket.create_server(("127.0.0.1", port), backlog=400)
for _ in range(workers):
    if os.fork() == 0:
        serve(listener)
print("listening", flush=True)
while True:
    os.wait()
