"""Takes a lock that a service needs: holder.py MODE FILE REDIS. SIGUSR1 starts that, SIGUSR2 ends it.

  lockf    holds the lock on the file while it waits for an answer of the Redis on that port, again and again
  sqlite   computes in a transaction that writes to the database
"""

import fcntl
import signal
import socket
import sqlite3
import sys
import time

mode, path, redis = sys.argv[1], sys.argv[2], int(sys.argv[3])
trouble = False


def note(number, _):
    global trouble
    trouble = number == signal.SIGUSR1


def lock_and_call():
    server = socket.create_connection(("127.0.0.1", redis))
    with open(path, "a+b") as file:
        while trouble:
            fcntl.lockf(file, fcntl.LOCK_EX)
            server.sendall(b"GET greeting\r\n")
            server.recv(4096)
            fcntl.lockf(file, fcntl.LOCK_UN)
            time.sleep(0.002)


def write_and_compute():
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE t SET n = n + 1")
    while trouble:
        sum(i * i for i in range(1000))
    database.execute("COMMIT")
    database.close()


for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
print("ready", flush=True)
while True:
    if trouble:
        lock_and_call() if mode == "lockf" else write_and_compute()
    time.sleep(0.01)
