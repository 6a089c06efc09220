"""A page in headless Chromium that a test types into: keys go in as a keyboard's, and what the page says comes out.

The DevTools protocol over a pair of pipes (``--remote-debugging-pipe``): messages of JSON that end with a null byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import browser

PATIENCE = 30.0
"""Seconds within which Chromium must answer, and a page say what is waited for."""
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_LAUNCH = """
import os, sys
commands, answers = int(sys.argv[1]), int(sys.argv[2])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and writes answers to 4."""
CUT = """
[...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.left < -1 || box.right > innerWidth + 1);
}).map((element) => element.outerHTML.slice(0, 80))
"""
"""The elements that are cut off at the left or right edge of the window."""


class Page:
    """One page; ``console`` has what it complained of."""

    def __init__(self, commands: int, answers: int) -> None:
        self.console: list[str] = []
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def open(self, url: str) -> None:
        """Goes to an address and waits for the page."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
        """What the page says."""
        return str(self.evaluate("document.body.innerText"))

    def wait_for(self, expression: str) -> None:
        """Waits until an expression is true; while a page changes there may be none to ask."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if self.evaluate(expression):
                    return
            except AssertionError:
                pass
            time.sleep(0.01)
        raise AssertionError(f"{expression} is never true; the page says: {self.text()}")

    def press(self, key: str, *, times: int = 1, held: bool = False) -> None:
        """Presses a key; ``held`` keys repeat without being let go."""
        for number in range(times):
            text = "\r" if key == "Enter" else key
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, autoRepeat=held and number > 0)
            if not held:
                self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, *, width: int, height: int = 900) -> None:
        """Writes a PNG of the page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Log.entryAdded":
            self.console.append(event["params"]["entry"]["text"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.console.append(event["params"]["exceptionDetails"]["text"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            piece = os.read(self._answers, 1 << 16)
            assert piece, "Chromium has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def opened_page() -> Iterator[Page]:
    """A new Chromium with one page; it ends with the block."""
    program = browser()
    assert program is not None, "no Chromium here; ask browser() first"
    chromium_in, ours_out = os.pipe()
    ours_in, chromium_out = os.pipe()
    given = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (chromium_in, chromium_out)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        argv = [sys.executable, "-c", _LAUNCH, *map(str, given), program, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(argv, pass_fds=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for descriptor in (chromium_in, chromium_out, *given):
                os.close(descriptor)
            yield Page(ours_out, ours_in)
        finally:
            os.close(ours_out)  # Chromium ends when nobody commands it
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(ours_in)
