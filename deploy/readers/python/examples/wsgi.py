"""A WSGI middleware that refuses what the service's queues cannot bear, around a tiny service.

    python3 wsgi.py 8000                                                  # the standard library's server
    uwsgi --http-socket :8000 --master --processes 4 --wsgi-file wsgi.py  # or any other

By how long the request waited for a worker where the server says which connection it came on, as uWSGI and gunicorn do (where
they serve HTTP themselves, over TCP and without TLS); else by the share. TAILBACK_PAGE names the page;
/run/tailback/shop/page if it is not set.
"""

import os
import sys

# Only so that this runs where it lies: in a service, tailback_page.py lies beside its own modules.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import tailback_page

try:
    import uwsgi
except ImportError:
    uwsgi = None


def connection(environ):
    # With TLS, the handshake came just before the request: by the connection, everything would be admitted.
    if environ["wsgi.url_scheme"] == "https":
        return None
    return uwsgi.connection_fd() if uwsgi else environ.get("gunicorn.socket")


class Backpressure:
    def __init__(self, app, path):
        self.app = app
        self.page = tailback_page.open(path)

    def __call__(self, environ, start_response):
        if self.page.should_admit_from(connection(environ)):
            return self.app(environ, start_response)
        start_response("503 Service Unavailable", [("Retry-After", self.page.pressure().retry_after_header)])
        return [b"too busy, come again\n"]


def shop(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello\n"]


application = Backpressure(shop, os.environ.get("TAILBACK_PAGE", "/run/tailback/shop/page"))

if __name__ == "__main__":
    from wsgiref.simple_server import make_server

    make_server("", int(sys.argv[1]), application).serve_forever()
