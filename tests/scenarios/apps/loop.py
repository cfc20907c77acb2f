"""An ASGI service; /report computes in the event loop for 1.2 s."""

import time


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/report":
        end = time.thread_time() + 1.2
        while time.thread_time() < end:
            sum(range(1000))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello\n"})
