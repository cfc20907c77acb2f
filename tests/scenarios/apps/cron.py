"""A job that computes for half a second, every three seconds."""

import time

print("ready", flush=True)
while True:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        sum(range(1000))
    time.sleep(2.5)
