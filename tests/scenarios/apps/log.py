"""A log daemon and the collector that it forwards to: log.py collect PORT | log.py forward PATH PORT."""

import socket
import sys

SMALL = 4096
if sys.argv[1] == "collect":
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    listener.bind(("127.0.0.1", int(sys.argv[2])))
    listener.listen()
    print("listening", flush=True)
    daemon, _ = listener.accept()
    while daemon.recv(65536):
        pass
else:
    messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    messages.bind(sys.argv[2])
    collector = socket.socket()
    collector.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    collector.connect(("127.0.0.1", int(sys.argv[3])))
    print("listening", flush=True)
    while True:
        collector.sendall(messages.recv(65536))
