"""A page opened in headless Chromium: what its console says, what became of it, and a picture. ``python -m
tests.browser PAGE PICTURE.png`` takes the pictures of the docs, such as ``python -m tests.browser
runs/quickstart/report.html docs/report.png --height 1625`` and ``python -m tests.browser
sweeps/quickstart.dpo_beta/sweep.html docs/sweep.png``; ``--height`` cuts or lengthens one."""

from __future__ import annotations

import argparse
import base64
import fcntl
import html
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
  const scrolls = element.closest(".scroll svg");
  return box.width > 0 && !scrolls && (box.left < -1 || box.right > innerWidth + 1);
}).map((element) => element.outerHTML.slice(0, 80))
"""
"""The elements that are cut off at the left or right edge of the window. A drawing may be scrolled."""


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
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
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
        for number in range(times):
            text = "\r" if key == "Enter" else key
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, autoRepeat=held and number > 0)
            if not held:
                self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, *, width: int, height: int = 900) -> None:
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


WIDTH, HEIGHT = 1100, 1500
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FOR_ONE_PAGE = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--dump-dom",
)
_CONSOLE = re.compile(r"^\[[^\]]*CONSOLE[^\]]*\]\s*(?P<message>.*)$", re.MULTILINE)


def browser() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """``console`` has its lines, of which a page without scripts has none but complaints; ``dom`` is HTML again."""

    console: list[str]
    dom: str


def opened(page: Path, picture: Path, *, width: int = WIDTH, height: int = HEIGHT) -> Opened:
    """Opens a page of this machine and writes a PNG of its first ``height`` pixels."""
    program = browser()
    assert program is not None, "no Chromium here; ask browser() first"
    with tempfile.TemporaryDirectory() as profile:
        own = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture}"]
        done = subprocess.run(
            [program, *_FOR_ONE_PAGE, *own, page.resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert picture.is_file(), done.stderr
    return Opened(console=[match["message"] for match in _CONSOLE.finditer(done.stderr)], dom=done.stdout)


_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_MEASURE = """
function cutTexts(page) {
  for (const one of page.querySelectorAll("details")) one.open = true;
  const cut = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const parent = node.parentElement;
    if (!node.data.trim() || parent.tagName === "title" || !parent.checkVisibility()) continue;
    if (parent.closest(".scroll svg")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    let left = 0, right = page.documentElement.clientWidth;
    for (let one = parent; one; one = one.parentElement) {
      if (one.namespaceURI.endsWith("svg") || getComputedStyle(one).overflowX === "visible") continue;
      const clip = one.getBoundingClientRect();
      left = Math.max(left, clip.left);
      right = Math.min(right, clip.right);
    }
    if (box.left < left - 1 || box.right > right + 1) cut.push(node.data.trim());
  }
  return cut;
}
addEventListener("load", () => {
  const pages = [...document.querySelectorAll("iframe")].map((one) => one.contentDocument);
  const measured = document.createElement("pre");
  measured.id = "measured";
  measured.textContent = JSON.stringify(
    pages.map((page) => ({page: page.documentElement.scrollWidth, cut: cutTexts(page)})));
  document.body.append(measured);
});
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a page lies in a window, everything that can be unfolded being so. ``page`` is the width that it takes,
    ``cut`` the texts of which a part is out of sight to the left or right, but for drawings that scroll."""

    page: int
    cut: list[str]


def layouts_of(pages: Sequence[Path], *, widths: Sequence[int]) -> list[list[Layout]]:
    """Each page at each width, measured in frames, since a window of Chromium's is never narrower than 500 pixels. A
    page's own policy, which lets no script run, is left out of the copy that is measured."""
    frames = [
        f'<iframe srcdoc="{html.escape(_POLICY.sub("", page.read_text(encoding="utf-8")))}" '
        f'style="border: 0; width: {width}px; height: 900px"></iframe>'
        for page in pages
        for width in widths
    ]
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder, "measured.html")
        text = f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{_MEASURE}</script>"
        together.write_text(text, encoding="utf-8")
        dom = opened(together, Path(folder, "picture.png"), width=max(widths) + 100, height=500).dom
    measurements = re.findall(r'<pre id="measured">(.*?)</pre>', dom, flags=re.DOTALL)[-1]
    layouts = [Layout(**fields) for fields in json.loads(html.unescape(measurements))]
    return [layouts[first : first + len(widths)] for first in range(0, len(layouts), len(widths))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    options = parser.parse_args()
    if browser() is None:
        sys.exit(f"none of {', '.join(_NAMES)} is installed")
    messages = opened(options.page, options.picture, width=options.width, height=options.height).console
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB", *messages, sep="\n")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
