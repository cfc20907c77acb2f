"""A service with a fixed service time per request, which optionally sheds load as its page says."""

import os
import sys
import time

import uwsgi

page = None
if "TAILBACK_PAGE" in os.environ:
    sys.path.insert(0, os.environ["TAILBACK_READERS"])
    import tailback_page

    page = tailback_page.open(os.environ["TAILBACK_PAGE"])

database = None


def sql():
    global database
    if database is None:
        import psycopg2

        database = psycopg2.connect(host="127.0.0.1", port=os.environ["APP_SQL_PORT"], user="postgres", dbname="postgres")
        database.autocommit = True
    with database.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.04)")


def compute():
    """Uses CPU time; takes longer when a neighbour competes for the CPU."""
    end = time.thread_time() + 0.01
    while time.thread_time() < end:
        sum(range(1000))


work = {"sql": sql, "compute": compute}[os.environ["APP_WORK"]]


def application(environ, start_response):
    if page is not None and not page.should_admit_from(uwsgi.connection_fd()):
        start_response("503 Service Unavailable", [("Retry-After", page.pressure().retry_after_header)])
        return [b"busy\n"]
    work()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done\n"]
