"""A service of several processes: workers.py PORT WORKERS MODE ARGUMENT. Each request

  flock FILE    holds the lock on a file for 2 ms
  lockf FILE    the same, with a lock of the process
  sqlite FILE   writes to a SQLite database
  syslog PATH   logs to a unix socket, which all processes share
  call PORT     opens a connection to a server on this machine, asks and reads its answer
  redis PORT    asks Redis over a connection that is kept; between SIGUSR1 and SIGUSR2 over forty new ones, each of which the
                service closes and tries for until it gets it
  backoff 0     is taken between pauses: SIGUSR1 makes the workers sleep instead, SIGUSR2 ends that
"""

import fcntl
import logging.handlers
import os
import select
import signal
import socket
import sqlite3
import sys
import time

port, workers, mode, argument = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
listener = socket.create_server(("127.0.0.1", port), backlog=400)
trouble = False
children = []
log = logging.getLogger()
if mode == "syslog":
    log.addHandler(logging.handlers.SysLogHandler(argument))
if mode == "sqlite":
    made = sqlite3.connect(argument)
    made.executescript("CREATE TABLE IF NOT EXISTS t (n); INSERT INTO t VALUES (0)")
    made.close()


def locking(lock):
    file = open(argument, "a+b")

    def work():
        lock(file, fcntl.LOCK_EX)
        time.sleep(0.002)
        lock(file, fcntl.LOCK_UN)

    return work


def database():
    connection = sqlite3.connect(argument, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    return lambda: connection.execute("UPDATE t SET n = n + 1")


def call():
    with socket.create_connection(("127.0.0.1", int(argument)), 60) as server:
        server.sendall(b"GET / HTTP/1.0\r\n\r\n")
        server.recv(4096)


def ask(server):
    server.sendall(b"PING\r\n")
    server.recv(4096)


def fresh():
    while trouble:
        try:
            with socket.create_connection(("127.0.0.1", int(argument)), 60) as server:
                return ask(server)
        except OSError:
            time.sleep(0.1)


def redis():
    kept = socket.create_connection(("127.0.0.1", int(argument)), 60)

    def work():
        ask(kept)
        for _ in range(40):
            fresh()

    return work


def work_of(mode):
    return {
        "flock": lambda: locking(fcntl.flock),
        "lockf": lambda: locking(fcntl.lockf),
        "sqlite": database,
        "syslog": lambda: lambda: log.warning("x" * 2000),
        "call": lambda: call,
        "redis": redis,
        "backoff": lambda: lambda: None,
    }[mode]()


def note(number, _):
    global trouble
    trouble = number == signal.SIGUSR1
    for child in children:
        os.kill(child, number)


def wait_for_work():
    while mode == "backoff":
        if trouble:
            time.sleep(0.3)
        elif select.select([listener], [], [], 0.2)[0]:
            return


def serve():
    work = work_of(mode)
    while True:
        wait_for_work()
        client, _ = listener.accept()
        with client:
            if client.recv(4096):
                work()
                client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
for _ in range(workers):
    child = os.fork()
    if child == 0:
        children.clear()
        serve()
    children.append(child)
print("listening", flush=True)
while True:
    signal.pause()
