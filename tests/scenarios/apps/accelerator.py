"""A service that computes on an accelerator: accelerator.py PORT LIBRARY MODE. Each request needs the device for 5 ms, between
SIGUSR1 and SIGUSR2 for 80 ms. MODE: where it is awaited

  loop          the event loop itself
  thread        a thread, which takes one request after another from a queue
"""

import asyncio
import ctypes
import queue
import signal
import sys
import threading

port, library, mode = int(sys.argv[1]), ctypes.CDLL(sys.argv[2]), sys.argv[3]
library.synchronize.argtypes = [ctypes.c_double]
device_ms = 5.0
waiting = queue.Queue()


def serve_queue():
    while True:
        loop, done = waiting.get()
        library.synchronize(device_ms)
        loop.call_soon_threadsafe(done.set_result, None)


async def compute():
    if mode == "loop":
        library.synchronize(device_ms)
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    waiting.put((loop, done))
    await done


async def answer(reader, writer):
    if b"\r\n\r\n" in await reader.read(4096):
        await compute()
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
    writer.close()


def note(number):
    global device_ms
    device_ms = 80.0 if number == signal.SIGUSR1 else 5.0


async def serve():
    loop = asyncio.get_running_loop()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, note, number)
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=64)
    print("listening", flush=True)
    await server.serve_forever()


threading.Thread(target=serve_queue, name="engine", daemon=True).start()
asyncio.run(serve())
