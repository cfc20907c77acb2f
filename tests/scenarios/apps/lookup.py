"""A service whose threads each resolve a name in each request, with glibc: lookup.py PORT THREADS."""

import socket
import sys
import threading

port, threads = map(int, sys.argv[1:])
listener = socket.create_server(("127.0.0.1", port), backlog=400)


def serve():
    while True:
        client, _ = listener.accept()
        with client:
            if not client.recv(4096):
                continue
            status = "200 OK"
            try:
                socket.getaddrinfo("api.shop.test", 80, socket.AF_INET, socket.SOCK_STREAM)
            except socket.gaierror:
                status = "502 Bad Gateway"
            client.sendall(f"HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n".encode())


for _ in range(threads):
    threading.Thread(target=serve, daemon=True).start()
print("listening", flush=True)
threading.Event().wait()
