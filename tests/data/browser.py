"""A headless Chromium for tests, spoken to over its DevTools protocol: opens pages, clicks, looks.

Nothing beside aiohttp is needed; where no browser is installed `find()` is None.
"""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT_S = 60


def find() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab. Use as a context manager; `errors` holds what scripts or policy complained of."""

    def __init__(self, profile: Path) -> None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [find(), *options, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.port_file = profile / "DevToolsActivePort"
        self.loop = asyncio.new_event_loop()
        self.numbers = itertools.count(1)
        self.errors: list[str] = []

    def __enter__(self) -> "Browser":
        try:
            self.loop.run_until_complete(self._connect())
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=LIMIT_S)
        if hasattr(self, "session"):
            self.loop.run_until_complete(self.session.close())
        self.loop.close()

    def call(self, method: str, **parameters: object) -> dict:
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), LIMIT_S))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def run(self, script: str) -> object:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript condition holds."""
        end = time.monotonic() + LIMIT_S
        while not self.run(condition):
            assert time.monotonic() < end, f"never true in {LIMIT_S} s: {condition}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """As a person does: in the middle of the first element that fits, scrolled into view."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Across an element, from one share of its width to another."""
        x, y, width = *self.middle(selector), self.run(f"{_first(selector)}.clientWidth")
        left = x - width / 2
        self.mouse("mousePressed", left + start * width, y)
        self.mouse("mouseMoved", left + (start + end) / 2 * width, y)
        self.mouse("mouseMoved", left + end * width, y)
        self.mouse("mouseReleased", left + end * width, y)

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def middle(self, selector: str) -> list[float]:
        return self.run(
            f"(() => {{ const e = {_first(selector)}; e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )

    def size(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def picture(self, path: Path, selector: str = "body") -> None:
        """A PNG of an element, whole, also where the window does not show it."""
        box = self.run(
            f"(() => {{ scrollTo(0, 0); const b = {_first(selector)}.getBoundingClientRect();"
            "return {x: b.x, y: b.y, width: b.width, height: b.height, scale: 1}; })()"
        )
        shot = self.call("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def _connect(self) -> None:
        end = time.monotonic() + LIMIT_S
        while not self.port_file.exists() or "\n" not in self.port_file.read_text():
            assert time.monotonic() < end and self.process.poll() is None, "the browser did not start"
            await asyncio.sleep(0.05)
        port = self.port_file.read_text().split("\n")[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as reply:
            tab = next(one for one in await reply.json() if one["type"] == "page")
        self.socket = await self.session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    async def _call(self, method: str, parameters: dict) -> dict:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]


def _first(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"
