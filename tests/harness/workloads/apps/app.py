"""A WSGI service whose path encodes its work: /sleep/200/compute/5 sleeps 200 ms and then computes for 5 ms."""

import os
import socket
import time

redis = None
database = None


def sleep(ms):
    time.sleep(float(ms) / 1000)


def compute(ms):
    """Uses CPU time; takes longer when a neighbour competes for the CPU."""
    end = time.thread_time() + float(ms) / 1000
    while time.thread_time() < end:
        sum(range(1000))


def sell(_):
    """Updates one row, like a sale of one popular item."""
    global database
    if database is None:
        import psycopg2

        database = psycopg2.connect(host="127.0.0.1", port=os.environ["APP_SQL_PORT"], user="postgres", dbname="postgres")
        database.autocommit = True
    with database.cursor() as cursor:
        cursor.execute(os.environ["APP_SQL"])


def read(_):
    """Reads one row from MariaDB."""
    global database
    if database is None:
        import pymysql

        port = int(os.environ["APP_SQL_PORT"])
        database = pymysql.connect(host="127.0.0.1", port=port, user="root", database="shop", autocommit=True)
    with database.cursor() as cursor:
        cursor.execute(os.environ["APP_SQL"])
        cursor.fetchall()


def ask(count):
    global redis
    if redis is None:
        redis = socket.create_connection(("127.0.0.1", int(os.environ["APP_REDIS_PORT"]))).makefile("rwb")
    for _ in range(int(count)):
        redis.write(os.environ.get("APP_REDIS_COMMAND", "GET greeting").encode() + b"\r\n")
        redis.flush()
        redis.readline()


WORK = {"sleep": sleep, "compute": compute, "sell": sell, "read": read, "ask": ask}


def application(environ, start_response):
    words = [word for word in environ["PATH_INFO"].split("/") if word]
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length:
        environ["wsgi.input"].read(length)
    size = 6
    for what, amount in zip(words[::2], words[1::2]):
        if what == "size":
            size = int(amount)
        else:
            WORK[what](amount)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
    return [b"x" * size]
