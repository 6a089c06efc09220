"""A page opened in headless Chromium: what its console says, what became of it, and a picture.

``python -m tests.browser PAGE PICTURE.png`` takes the pictures of the docs, such as
``python -m tests.browser sweeps/quickstart.dpo_beta/sweep.html docs/sweep.png``; ``--height`` cuts or lengthens one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
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
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


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
    return Opened(console=[found["message"] for found in _CONSOLE.finditer(done.stderr)], dom=done.stdout)


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
    said = opened(options.page, options.picture, width=options.width, height=options.height).console
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB", *said, sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
