"""Websockets: chat.py PORT serves them, and sends something to all of its clients once a second. chat.py PORT COUNT is that many
clients, each of which says something every few seconds."""

import asyncio
import random
import sys

import websockets

port = int(sys.argv[1])
clients = set()


async def serve(client):
    clients.add(client)
    try:
        async for message in client:
            await client.send(message)
    finally:
        clients.discard(client)


async def server():
    async with websockets.serve(serve, "127.0.0.1", port):
        print("listening", flush=True)
        while True:
            await asyncio.sleep(1)
            websockets.broadcast(clients, "news")


async def client():
    async with websockets.connect(f"ws://127.0.0.1:{port}") as connection:
        async def talk():
            while True:
                await asyncio.sleep(random.uniform(1, 5))
                await connection.send("hello")

        task = asyncio.create_task(talk())
        async for _ in connection:
            pass
        await task


async def crowd(count):
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(client()))
        await asyncio.sleep(0.002)
    print("connected", flush=True)
    await asyncio.gather(*tasks)


asyncio.run(server() if len(sys.argv) == 2 else crowd(int(sys.argv[2])))
