"""A WSGI middleware that sheds load as the page asks, around a tiny service.

    python3 wsgi.py 8000                                                  # the standard library's server
    uwsgi --http-socket :8000 --master --processes 4 --wsgi-file wsgi.py  # or any other

If the server provides the connection, as uWSGI and gunicorn do when they serve HTTP themselves over TCP without TLS, it decides by
how long a request waited for a worker; else by the admit ratio. TAILBACK_PAGE is the path of the page, by default
/run/tailback/shop/page.
"""

import os
import sys

# Only for this example: in a service, tailback_page.py lies beside its own modules.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import tailback_page

try:
    import uwsgi
except ImportError:
    uwsgi = None


def connection(environ):
    # With TLS, the handshake precedes the request, so by the connection everything would be admitted.
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
