"""The latest metrics of a run for Prometheus, as text over HTTP: optional, from the main rank, on
loopback."""

import math
import re
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_jackpot.monitor.metrics import METRICS

PREFIX = "megatron_jackpot_"


def gauge_name(metric: str) -> str:
    """Example: "kl/target_server" -> "megatron_jackpot_kl_target_server"."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def exposition(step: int, metrics: Mapping[str, float], at_s: float) -> str:
    """The text format, version 0.0.4; values that are not finite are left out."""
    lines = []
    rows = {"step": float(step), "updated_seconds": at_s, **metrics}
    meanings = {"step": "steps done", "updated_seconds": "unix time of these values", **METRICS}
    for metric, value in rows.items():
        if not math.isfinite(value):
            continue
        name = gauge_name(metric)
        if metric in meanings:
            lines.append(f"# HELP {name} {meanings[metric]}")
        lines += [f"# TYPE {name} gauge", f"{name} {float(value)!r}"]
    return "\n".join(lines) + "\n"


class PrometheusEndpoint:
    """http://host:port/metrics. Use as a context manager; a metric keeps its value until it is written again.

    Raises ValueError when the port is in use.
    """

    def __init__(self, host: str, port: int) -> None:
        self._text = exposition(0, {}, time.time())
        self._metrics: dict[str, float] = {}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                found = self.path.split("?")[0] == "/metrics"
                body = (endpoint._text if found else "see /metrics\n").encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A scrape every few seconds is no news."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise ValueError(
                f"logging.prometheus_port = {port} on {host} cannot be used: {error}. Set another, or null."
            ) from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="prometheus")
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics |= metrics
        self._text = exposition(step, self._metrics, time.time())

    def __enter__(self) -> "PrometheusEndpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
