"""Clients that give up after a second and try again, five times: retries.py PORT PER-SECOND. SIGUSR1 adds 300 calls at once,
after SIGUSR2 nobody tries again."""

import asyncio
import signal
import sys

port, per_s = map(int, sys.argv[1:])
attempts = 6


async def attempt():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /sleep/20 HTTP/1.0\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()


async def call():
    for _ in range(attempts):
        try:
            if await asyncio.wait_for(attempt(), 1):
                return
        except (OSError, asyncio.TimeoutError):
            pass
        if attempts == 1:
            return


def burst():
    calls.extend(asyncio.ensure_future(call()) for _ in range(300))


def stop():
    global attempts
    attempts = 1


async def serve():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, burst)
    loop.add_signal_handler(signal.SIGUSR2, stop)
    print("ready", flush=True)
    due = loop.time()
    while True:
        calls.append(asyncio.ensure_future(call()))
        calls[:] = [one for one in calls if not one.done()]
        due += 1 / per_s
        await asyncio.sleep(max(0, due - loop.time()))


calls = []
asyncio.run(serve())
