"""A service whose requests take as long as a file says. The worker sleeps meanwhile, so that the measurement has the CPU."""

import os
import time

SERVICE_MS = os.environ["APP_SERVICE_MS"]


def application(environ, start_response):
    with open(SERVICE_MS) as file:
        service_ms = float(file.read())
    time.sleep(service_ms / 1000)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"done\n"]
