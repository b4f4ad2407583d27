"""The page while the run goes on: over HTTP, on loopback alone."""

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from megatron_jackpot.monitor.report.content import Tree, content, rows_of, version
from megatron_jackpot.monitor.report.health import TRAIN_LOGS, duration, signs
from megatron_jackpot.monitor.report.page import render
from megatron_jackpot.monitor.report.rejections import NewestDecisions
from megatron_jackpot.run.provenance import METRICS_FILE, PROVENANCE_FILE, check_run_folder

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
ASK_EVERY_S = 3.0
REQUEST_LIMIT_S = 10
POLL_S = 1.0
SILENT_START_S = 900
"""A run whose servers start and whose models load has no row; one that is silent for longer has another
trouble."""


class ReportServer:
    """http://127.0.0.1:PORT/ is the page, /data its tree where that is newer than ?than=VERSION.

    Use as a context manager. Raises ValueError when the port is in use, or for runs that have no page yet.
    """

    def __init__(self, folders: Sequence[Path], port: int) -> None:
        self.folders = folders
        self._lock = threading.Lock()
        self._newest = NewestDecisions()
        self._tree: Tree = content(folders, self._newest)
        report = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_LIMIT_S

            def do_GET(self) -> None:
                self.answer(*report.reply(self.path, self.headers.get("Host", "")))

            def answer(self, status: int, kind: str, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A request every few seconds is no news."""

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--port {port} on {HOST} cannot be used: {error}. Name another, or 0 for any that is free."
            ) from error
        self.port = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}/"

    def reply(self, path: str, host: str) -> tuple[int, str, str]:
        """(status, type, body) of a request. A page of another name that resolves to this machine is not
        answered: it could read what the runs say."""
        if _name(host) not in NAMES:
            return 403, "text/plain", f"ask for {self.url}\n"
        parts = urlsplit(path)
        try:
            if parts.path == "/":
                return 200, "text/html", render(self.tree(), live_s=ASK_EVERY_S)
            if parts.path == "/data":
                than = parse_qs(parts.query).get("than", [""])[0]
                if version(self.folders) == than:
                    return 204, "application/json", ""
                return 200, "application/json", json.dumps(self.tree(), allow_nan=False)
        except (ValueError, OSError) as error:
            # Between two writes of a run, or after its folder has gone: the page says so and asks again.
            return 503, "text/plain", f"{error}\n"
        return 404, "text/plain", "see /\n"

    def tree(self) -> Tree:
        with self._lock:
            if self._tree["version"] != version(self.folders):
                self._tree = content(self.folders, self._newest)
            return self._tree

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.server_close()


def _name(host: str) -> str | None:
    """Without the port, which browsers leave out where it is 80."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def serve(folders: Sequence[Path], port: int) -> None:
    """Say where the page is, and serve it until Ctrl-C; of runs that have begun, from their first row on.

    Raises ValueError as `ReportServer`, and for a run that has no row and does nothing any more.
    """
    with contextlib.suppress(KeyboardInterrupt):
        _await_rows(folders)
        with ReportServer(folders, port) as report:
            print(f"{report.url} (on this machine alone; Ctrl-C ends it)", flush=True)
            report.serve_forever()


def _await_rows(folders: Sequence[Path]) -> None:
    """Until every run that a launch has begun has its first row, as long as it shows signs of life.

    Raises ValueError for one that shows none.
    """
    for folder in folders:
        if not (folder / PROVENANCE_FILE).is_file() or rows_of(folder):
            continue
        check_run_folder(folder)
        print(f"{folder} has begun and has no row yet: waiting for the first", flush=True)
        while not rows_of(folder):
            heard = signs(folder)
            if not heard.alive(SILENT_START_S):
                raise ValueError(
                    f"{folder} has no row in {METRICS_FILE}, and its logs have been silent for "
                    f"{duration(heard.newest_s)}. They say what became of it: {TRAIN_LOGS}, server-*.log."
                )
            time.sleep(POLL_S)
