"""The page in Chromium: twenty pairs by keyboard, closed in the middle, two annotators, two widths."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignment.commands.judge.ballots import Ballots
from alignment.commands.judge.web_app import application
from alignment.commands.shared.listening import listening
from alignment.commands.shared.page_server import PageServer
from alignment.evaluation.answer_pairs import queue, shown_first
from alignment.records.votes import TIE, read_votes
from tests.browser import browser
from tests.devtools import CUT, Page, opened_page
from tests.judged import ARMS, pair

PAIRS = [pair(number, dpo=f"It is {number}. " * (1 + 40 * (number % 5 == 0))) for number in range(1, 21)]
KEYS = "1202101220"
READY = "document.readyState === 'complete'"


@contextmanager
def serving(file: Path) -> Iterator[str]:
    """The page on a free port until the block ends; yields its address."""
    with listening(0) as listener:
        ballots = Ballots(file, PAIRS, ARMS)
        page = PageServer(lambda token: application(ballots, token, run="mine", annotator=None), listener)
        thread = threading.Thread(target=page.serve, daemon=True)
        thread.start()
        try:
            yield page.address
        finally:
            page.stop()
            thread.join(20)


def begin(page: Page, address: str, name: str) -> None:
    page.open(address)
    page.wait_for("document.activeElement?.id === 'annotator'")  # letters that come before are lost
    for letter in name:
        page.press(letter)
    assert page.evaluate("document.activeElement.value") == name
    page.press("Enter")
    page.wait_for(f"document.querySelector('.count') !== null && {READY}")


def judge(page: Page, keys: str, *, judged: int) -> None:
    """Presses a key for each pair, and waits for the next one."""
    for number, key in enumerate(keys, start=judged + 1):
        page.press(key)
        page.wait_for(f"document.querySelector('.count')?.textContent.startsWith('{number} of') && {READY}")


def expected(name: str, keys: str) -> list[tuple[str, str]]:
    """The votes that these keys mean: the pair, and whom it prefers."""
    votes = []
    for about, key in zip(queue(PAIRS), keys, strict=False):
        first = shown_first(about, name)
        second = next(arm for arm in ARMS if arm != first)
        votes.append((about.key, {"1": first, "2": second, "0": TIE}[key]))
    return votes


def test_people_judge_by_keyboard_stop_and_go_on(tmp_path: Path) -> None:
    if browser() is None:
        pytest.skip("Chromium is not installed: the page cannot be opened")
    file = tmp_path / "votes.jsonl"
    with opened_page() as page:
        with serving(file) as address:
            begin(page, address, "ada")
            judge(page, KEYS, judged=0)
            page.press("u")
            page.wait_for(f"document.querySelector('.count')?.textContent.startsWith('9 of') && {READY}")
            assert len(read_votes(file)) == 9
            page.press("x", times=3)
            judge(page, KEYS[9], judged=9)
            page.press("1", times=5, held=True)
            page.wait_for(f"document.querySelector('.count')?.textContent.startsWith('11 of') && {READY}")
            for width in (390, 1280):
                page.picture(tmp_path / f"{width}.png", width=width)
                assert page.evaluate(CUT) == [], f"cut off at {width} pixels"
            assert page.console == []
        with serving(file) as address:
            begin(page, address, "ada")
            assert "11 of 20 judged" in page.text()
            judge(page, KEYS[1:], judged=11)
            assert "All pairs are judged" in page.text()
            begin(page, address, "bo")
            judge(page, KEYS[::-1], judged=0)
            assert page.console == []
    votes = read_votes(file)
    of_ada, of_bo = (
        [(vote.pair, vote.preferred) for vote in votes if vote.annotator == name] for name in ("ada", "bo")
    )
    assert of_ada == expected("ada", KEYS + "1" + KEYS[1:])
    assert of_bo == expected("bo", KEYS[::-1])
