"""A headless Chromium, driven over its own pipe: no driver and no package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60


class Browser:
    """Sends commands of the DevTools protocol and waits for their results; see `open_browser`."""

    def __init__(self, reads: Any, writes: Any) -> None:
        self.reads, self.writes, self.count = reads, writes, 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.writes.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self.writes.flush()
        while True:
            found = json.loads(self._next())
            if found.get("id") == self.count:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append(found)

    def _next(self) -> bytes:
        piece = bytearray()
        while (letter := self.reads.read(1)) != b"\0":
            assert letter, "the browser has gone"
            piece += letter
        return bytes(piece)

    def open(self, file: Path, width: int = 1300, height: int = 1000) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.size(width, height)
        page.send("Page.navigate", url=file.resolve().as_uri())
        page.wait("document.readyState === 'complete' && !!document.querySelector('#title').textContent")
        return page


class Page:
    """A tab of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and requests beside the page's own."""
        self.run("1")
        said = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                said.append(str(params["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                said.append(str(params["args"]))
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                said.append(str(params["entry"]))
            url = params["request"]["url"] if method == "Network.requestWillBeSent" else "data:"
            if not url.startswith(("data:", "file:")):
                said.append(url)
        return said

    def shoot(self, file: Path) -> bytes:
        """Write a picture of the page as it is seen; returns its bytes."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
        return file.read_bytes()


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium; it ends with the block."""
    assert FOUND is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    # Chromium reads from descriptor 3 and writes to 4, so our descriptors need higher numbers.
    high = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (their_in, their_out)]
    command = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    started = subprocess.Popen(
        ["bash", "-c", command, "bash", FOUND, *options],
        pass_fds=high,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for pipe in (their_in, their_out, *high):
        os.close(pipe)
    try:
        with os.fdopen(our_out, "wb") as writes, os.fdopen(our_in, "rb") as reads:
            yield Browser(reads, writes)
    finally:
        started.terminate()
        started.wait(SECONDS)
