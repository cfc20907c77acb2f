"""Devices that publish reports in an open loop: devices.py BROKER_PORT PER_S."""

import sys
import time

import paho.mqtt.client

port, per_s = map(int, sys.argv[1:])
client = paho.mqtt.client.Client()
client.connect("127.0.0.1", port)
client.loop_start()
due = time.monotonic()
number = 0
while True:
    client.publish(f"devices/{number % 50}", b"x" * 1000, qos=0)
    number += 1
    due += 1 / per_s
    time.sleep(max(0, due - time.monotonic()))
