"""Opens a PostgreSQL session, runs commands in one transaction, and stays open: session.py PORT SQL..."""

import sys
import time

import psycopg2

port, *commands = sys.argv[1:]
session = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
with session.cursor() as cursor:
    for command in commands:
        cursor.execute(command)
print("done", session.info.backend_pid, flush=True)
time.sleep(1000)
