"""A service of several processes, each with an event loop and a listening socket of its own (SO_REUSEPORT):
reuseport.py PORT WORKERS MODE. After SIGUSR1, one request occupies the process until SIGUSR2, because its handler

  compute       computes
  sleep         sleeps
"""

import asyncio
import os
import signal
import sys
import time

port, workers, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
trouble = False


def occupied():
    while trouble:
        if mode == "compute":
            sum(range(1000))
        else:
            time.sleep(0.2)


async def answer(reader, writer):
    if b"\r\n\r\n" in await reader.read(4096):
        occupied()
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
    writer.close()


def note(number, _):
    global trouble
    trouble = number == signal.SIGUSR1


async def serve():
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=64, reuse_port=True)
    # In one piece: all workers write to the same pipe.
    os.write(1, b"worker %d\n" % os.getpid())
    await server.serve_forever()


for _ in range(workers):
    if os.fork() == 0:
        asyncio.run(serve())
while True:
    signal.pause()
