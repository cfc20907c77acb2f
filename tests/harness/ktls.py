"""Opens a kTLS connection (AES-GCM) and sends 5,000 plain bytes that stay unread. Prints `ready PORT`, or `none: ERROR`."""

import socket
import struct
import sys
import time

TCP_ULP, SOL_TLS, TLS_TX, TLS_RX = 31, 282, 1, 2
TLS_1_2_VERSION, TLS_CIPHER_AES_GCM_128 = 0x0303, 51
KEYS = struct.pack("HH8s16s4s8s", TLS_1_2_VERSION, TLS_CIPHER_AES_GCM_128, b"i" * 8, b"k" * 16, b"s" * 4, bytes(8))

listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server = listener.accept()[0]
try:
    for end, direction in ((client, TLS_TX), (server, TLS_RX)):
        end.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        end.setsockopt(SOL_TLS, direction, KEYS)
except OSError as error:
    print("none:", error, flush=True)
    sys.exit(0)
client.sendall(bytes(5000))
print("ready", listener.getsockname()[1], flush=True)
time.sleep(3600)
