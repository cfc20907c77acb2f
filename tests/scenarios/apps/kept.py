"""Clients that each keep a connection: kept.py PORT COUNT. Each asks about eight times a second and reads the answer."""

import asyncio
import random
import sys

port, count = map(int, sys.argv[1:])


async def client():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        await reader.readexactly(int(lengths[0]))
        await asyncio.sleep(random.uniform(0.05, 0.2))


async def crowd():
    tasks = [asyncio.create_task(client()) for _ in range(count)]
    print("ready", flush=True)
    await asyncio.gather(*tasks)


asyncio.run(crowd())
