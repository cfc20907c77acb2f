"""A service with an event loop that stops to close connections after SIGUSR1, and closes them all after SIGUSR2:
leak.py PORT FILES MODE. FILES: its limit of descriptors. MODE:

  accepted      those that it has accepted
  PORT          those that it opens to a server on this machine, which closes each after its answer
"""

import asyncio
import resource
import signal
import sys

port, files, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
trouble = False
leaked = []


def done(writer, is_leaky):
    if trouble and is_leaky:
        leaked.append(writer)
    else:
        writer.close()


async def call():
    reader, writer = await asyncio.open_connection("127.0.0.1", int(mode))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    await reader.read(4096)
    done(writer, True)


async def answer(reader, writer):
    if b"\r\n\r\n" in await reader.read(4096):
        status = b"200 OK"
        try:
            if mode != "accepted":
                await call()
        except OSError:
            status = b"502 Bad Gateway"
        writer.write(b"HTTP/1.0 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
    done(writer, mode == "accepted")


def note(number, _):
    global trouble
    trouble = number == signal.SIGUSR1
    if not trouble:
        close()


def close():
    while leaked:
        leaked.pop().close()


async def serve():
    loop = asyncio.get_running_loop()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, note, number, None)
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=64)
    print("listening", flush=True)
    await server.serve_forever()


asyncio.run(serve())
