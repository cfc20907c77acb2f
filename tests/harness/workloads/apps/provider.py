"""An ASGI service that streams: 50 ms to the first word, then 10 words 20 ms apart. While the file named by PROVIDER_SLOW
exists, the first word takes the number of ms in it instead."""

import asyncio
import os

SLOW = os.environ["PROVIDER_SLOW"]


def first_ms():
    try:
        with open(SLOW) as file:
            return float(file.read())
    except FileNotFoundError:
        return 50


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    await asyncio.sleep(first_ms() / 1000)
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for word in range(10):
        await send({"type": "http.response.body", "body": b"data: word\n\n", "more_body": True})
        await asyncio.sleep(0.02)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
