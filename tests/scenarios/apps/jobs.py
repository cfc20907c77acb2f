"""A queue of jobs in Redis: jobs.py run PORT WORKERS runs them, 10 ms each, in that many processes. jobs.py add PORT COUNT adds
that many every two seconds."""

import os
import socket
import sys
import time

redis = None


def connect(port):
    global redis
    redis = socket.create_connection(("127.0.0.1", port)).makefile("rwb")


def command(*words):
    redis.write(b"*%d\r\n" % len(words))
    for word in words:
        word = word.encode()
        redis.write(b"$%d\r\n%s\r\n" % (len(word), word))
    redis.flush()


def work(port):
    connect(port)
    while True:
        command("BLPOP", "jobs", "0")
        for _ in range(5):
            redis.readline()
        time.sleep(0.01)


def add(port, count):
    connect(port)
    print("ready", flush=True)
    while True:
        command("RPUSH", "jobs", *(str(number) for number in range(count)))
        redis.readline()
        time.sleep(2)


def run(port, workers):
    for _ in range(workers):
        if os.fork() == 0:
            work(port)
    print("ready", flush=True)
    os.wait()


{"run": run, "add": add}[sys.argv[1]](*map(int, sys.argv[2:]))
