"""An ASGI service; /report computes in the event loop for 300 ms."""

import time


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/report":
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            sum(range(1000))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello\n"})
