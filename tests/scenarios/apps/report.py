"""report.py PORT TRANSACTIONS opens that many transactions at the database, and leaves them idle."""

import sys
import time

import psycopg2

port, transactions = map(int, sys.argv[1:])
connections = []
for _ in range(transactions):
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.cursor().execute("SELECT 1")
    connections.append(connection)
print("open", flush=True)
time.sleep(600)
