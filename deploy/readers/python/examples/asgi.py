"""An ASGI middleware that sheds load as the page asks, around a tiny service.

    uvicorn asgi:application --port 8000    # or hypercorn, daphne, granian
    python3 asgi.py 8000                    # the same, if uvicorn is installed

In FastAPI or Starlette: app.add_middleware(Backpressure, path="/run/tailback/shop/page").

If a proxy on this machine sets X-Request-Start, it decides by how long a request waited, else by the admit ratio. Use the header
only behind such a proxy: otherwise clients can forge it. TAILBACK_PAGE is the path of the page, by default
/run/tailback/shop/page.
"""

import os
import sys

# Only for this example: in a service, tailback_page.py lies beside its own modules.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import tailback_page


class Backpressure:
    def __init__(self, app, path):
        self.app = app
        self.page = tailback_page.open(path)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or self.page.should_admit_after(waited_s(scope)):
            return await self.app(scope, receive, send)
        retry_after = self.page.pressure().retry_after_header.encode()
        await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", retry_after)]})
        await send({"type": "http.response.body", "body": b"too busy, come again\n"})


def waited_s(scope):
    return tailback_page.since_s(dict(scope["headers"]).get(b"x-request-start", b"").decode("latin-1"))


async def shop(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"hello\n"})


application = Backpressure(shop, os.environ.get("TAILBACK_PAGE", "/run/tailback/shop/page"))

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(application, port=int(sys.argv[1]))
