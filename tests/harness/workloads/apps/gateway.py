"""An ASGI gateway: forwards each request to the provider over a pool of GATEWAY_POOL persistent connections and streams
the response back."""

import asyncio
import os

PORT = int(os.environ["GATEWAY_PROVIDER"])
POOL = int(os.environ["GATEWAY_POOL"])
ASK = b"GET / HTTP/1.1\r\nHost: provider\r\n\r\n"
idle = []
places = asyncio.Semaphore(POOL)


async def lines(reader):
    """Yields the chunks of a response in chunked encoding."""
    while (await reader.readline()).strip():
        pass
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello\n"})
        return
    async with places:
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(ASK)
        begun = False
        async for chunk in lines(reader):
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        idle.append((reader, writer))
    await send({"type": "http.response.body", "body": b""})
