"""Writes messages of an MQTT broker into a database: consumer.py BROKER_PORT SQL_PORT."""

import sys

import paho.mqtt.client
import psycopg2

broker, sql = map(int, sys.argv[1:])
database = psycopg2.connect(host="127.0.0.1", port=sql, user="postgres", dbname="postgres")
database.autocommit = True
cursor = database.cursor()


def on_message(client, data, message):
    cursor.execute("INSERT INTO readings VALUES (%s)", (len(message.payload),))


def on_subscribe(*_):
    print("subscribed", flush=True)


client = paho.mqtt.client.Client()
client.on_message = on_message
client.on_subscribe = on_subscribe
client.connect("127.0.0.1", broker)
client.subscribe("devices/#", qos=0)
client.loop_forever()
