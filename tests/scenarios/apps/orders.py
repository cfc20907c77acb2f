"""Orders in a queue of RQ: orders.py work REDIS POSTGRES WORKERS works on them in that many processes; with fork, each of these forks
another one for each order. orders.py add REDIS PER_SECOND adds them."""

import os
import sys
import time

import psycopg2
from redis import Redis
from rq import Queue, SimpleWorker, Worker

connect = None
database = None


def sell():
    connection = database or connect()
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE stock SET left_over = left_over - 1 WHERE item = 1")


def queue(port):
    return Queue("orders", connection=Redis(port=port))


def work(redis, postgres, workers, kind=SimpleWorker):
    # The jobs are functions of the module that they name.
    import orders

    orders.connect = lambda: psycopg2.connect(host="127.0.0.1", port=postgres, user="postgres")
    for _ in range(workers):
        if os.fork() == 0:
            if kind is SimpleWorker:
                orders.database = orders.connect()
            kind([queue(redis)], connection=Redis(port=redis)).work(logging_level="ERROR")
            os._exit(0)
    print("ready", flush=True)
    os.wait()


def fork(redis, postgres, workers):
    work(redis, postgres, workers, Worker)


def add(redis, per_s):
    orders = queue(redis)
    print("ready", flush=True)
    due = time.monotonic()
    while True:
        orders.enqueue("orders.sell", result_ttl=0)
        due += 1 / per_s
        time.sleep(max(0, due - time.monotonic()))


if __name__ == "__main__":
    {"work": work, "fork": fork, "add": add}[sys.argv[1]](*map(int, sys.argv[2:]))
