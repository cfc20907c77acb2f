"""A server with a backlog of two: backend.py PORT."""

import socket
import sys

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2)
print("listening", flush=True)
while True:
    client, _ = listener.accept()
    with client:
        if client.recv(4096):
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
