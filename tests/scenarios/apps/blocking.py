"""An ASGI application. Its handlers call other services as a library without asyncio does: the event loop waits meanwhile.

/       waits as many ms as the file APP_SLOW says, 5 without it, and lets the loop go on: the service that is called
/ask    calls the service at port APP_CALLS
/self   calls itself, with a timeout of 4 s
"""

import asyncio
import http.client
import os

SLOW = os.environ.get("APP_SLOW", "")
CALLS = int(os.environ.get("APP_CALLS", "0"))
kept = {}


def call(port, timeout):
    connection = kept.pop(port, None) or http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request("GET", "/")
    response = connection.getresponse()
    response.read()
    kept[port] = connection


async def wait():
    try:
        with open(SLOW) as file:
            ms = int(file.read())
    except FileNotFoundError:
        ms = 5
    await asyncio.sleep(ms / 1000)


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    status = 200
    try:
        if scope["path"] == "/ask":
            call(CALLS, 30)
        elif scope["path"] == "/self":
            call(scope["server"][1], 4)
        else:
            await wait()
    except OSError:
        status = 502
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"ok\n"})
