"""A WSGI application whose threads share a pool of APP_POOL connections to PostgreSQL.

/       takes a connection, queries for 20 ms and gives it back
/leak   takes a connection and returns without giving it back, as on an error
/twice  takes a second connection while it holds the first, in a transaction
"""

import os

from psycopg_pool import ConnectionPool

SIZE = int(os.environ["APP_POOL"])
pool = ConnectionPool(
    f"host=127.0.0.1 port={os.environ['APP_SQL_PORT']} user=postgres dbname=postgres",
    min_size=SIZE,
    max_size=SIZE,
    timeout=120,
    open=True,
)
leaked = []


def work(path):
    if path == "/leak":
        connection = pool.getconn()
        connection.autocommit = True
        connection.execute("SELECT 1")
        leaked.append(connection)
        return
    with pool.connection() as connection:
        connection.execute("SELECT pg_sleep(0.02)")
        if path == "/twice":
            with pool.connection() as second:
                second.execute("SELECT 1")


def application(environ, start_response):
    work(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\n"]
