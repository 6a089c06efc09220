"""A page opened in headless Chromium: what its console says, what became of it, and a picture.

``python -m tests.browser PAGE PICTURE.png`` takes the pictures of the docs, such as
``python -m tests.browser runs/quickstart/report.html docs/report.png --height 1625`` and
``python -m tests.browser sweeps/quickstart.dpo_beta/sweep.html docs/sweep.png``; ``--height`` cuts or lengthens one.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 1100, 1500
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
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
    """The program, or None where it is not installed."""
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
            [program, *_FLAGS, *own, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
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
    if (!node.data.trim() || node.parentElement.tagName === "title" || !node.parentElement.checkVisibility()) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    let left = 0, right = page.documentElement.clientWidth;
    for (let one = node.parentElement; one; one = one.parentElement) {
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
    """How a page lies in a window, everything that can be unfolded being so.

    ``page`` is the width that it takes, ``cut`` the texts of which a part is out of sight to the left or right.
    """

    page: int
    cut: list[str]


def layouts_of(pages: Sequence[Path], *, widths: Sequence[int]) -> list[list[Layout]]:
    """Each page at each width, measured in frames, since a window of Chromium's is never narrower than 500 pixels.

    A page's own policy, which lets no script run, is left out of the copy that is measured.
    """
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
    """Takes a picture; 1 where the page complained."""
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
