"""Opens connections whose sequence numbers wrap at 2^32, and prints `ready` once all queues are stable.

Prints one line per connection: port, bytes before the wrap at the start, unread bytes at the server (SIOCINQ), and
unacknowledged bytes at the client (SIOCOUTQ). TCP_REPAIR sets the initial sequence number of a socket before it connects
in the ordinary way.
"""

import fcntl
import socket
import struct
import sys
import termios
import time

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_SEND_QUEUE = 19, 20, 21, 2
SIOCOUTQ = termios.TIOCOUTQ


def queued(stream, which):
    return struct.unpack("I", fcntl.ioctl(stream, which, bytes(4)))[0]


def pair(before):
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.socket()
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    # The SYN takes one sequence number.
    first = struct.pack("I", 2**32 - 1 - before)
    client.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, first)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    client.connect(listener.getsockname())
    return listener, client, listener.accept()[0]


def send(client, count):
    """Sends up to `count` bytes, as many as the buffers accept."""
    client.setblocking(False)
    while count > 0:
        try:
            count -= client.send(bytes(min(count, 65536)))
        except BlockingIOError:
            return


def settled(server, client):
    """Returns both queues once they have not changed for 300 ms."""
    before, since = None, time.monotonic()
    while time.monotonic() - since < 0.3:
        now = queued(server, termios.FIONREAD), queued(client, SIOCOUTQ)
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.01)
    return before


kept = []
for word in sys.argv[1:]:
    before, sent, read = (int(number) for number in word.split(","))
    listener, client, server = pair(before)
    send(client, sent)
    if read:
        server.recv(read, socket.MSG_WAITALL)
    kept.append((listener, client, server, before))
for listener, client, server, before in kept:
    unread, unacknowledged = settled(server, client)
    print(listener.getsockname()[1], before, unread, unacknowledged, flush=True)
print("ready", flush=True)
time.sleep(3600)
