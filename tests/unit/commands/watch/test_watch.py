"""``align watch``: a page over HTTP that follows a run whose folder grows."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.shared.listening import listening
from alignment.commands.shared.page_server import PageServer
from alignment.commands.watch import live_app, verb
from alignment.commands.watch.live_app import application
from alignment.commands.watch.verb import Options, watch
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.locks import held
from alignment.pipeline.execute import run_state
from tests.browser import browser
from tests.devtools import CUT, opened_page
from tests.running import RunFolder

ROOT = Path(__file__).parents[4]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that goes on: its lock is held."""
    made = RunFolder(tmp_path)
    with held(made.folder / "lock", wait=False):
        yield made


@pytest.fixture
def address(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the page of the run is served, whose report is drawn as soon as something has changed."""
    monkeypatch.setattr(live_app, "REPORT_SECONDS", 0.0)
    with listening(0) as listener:
        server = PageServer(lambda token: application(run.folder, token), listener)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.stop()
            thread.join(20)


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return answer.read().decode()


def refusal(address: str, **headers: str) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(address, **headers)
    return caught.value.code, caught.value.read().decode()


class Text(HTMLParser):
    """The text of a page, with one space for any white space."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._pieces: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self._pieces).split())

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


def words(page: str) -> str:
    return Text(page).text


def revision(page: str) -> str:
    return re.findall(r'data-revision="([0-9a-f]+)"', page)[0]


def test_the_page_follows_a_run_to_its_end(run: RunFolder, address: str) -> None:
    run.stage("dpo", "running")
    run.progress("dpo", "training", 10, 40, loss=0.7)
    run.steps(
        "dpo", *({"step": n, "seconds": 2.0 * n, "num_tokens": 500 * n, "rewards/accuracies": 0.5} for n in (9, 10))
    )
    page = get(address)
    assert "This run is not finished (running): 0 of 4 stages have a result." in words(page)
    assert "dpo running training · 10/40" in words(page)
    assert "accuracy 0.5 ▄▄ 250 tokens/s" in words(page)
    assert "ppo waiting waits for reward" in words(page)
    assert 'aria-label="dpo, Accuracy: from 0.500 to 0.500"' in page, "the report has the curve so far"
    assert '<meta http-equiv="refresh"' in page

    run.progress("dpo", "training", 20, 40, loss=0.7)
    run.steps("dpo", {"step": 20, "seconds": 40.0, "num_tokens": 10_000, "rewards/accuracies": 0.75})
    status = get(f"{address}status")
    assert "training · 20/40" in words(status)
    assert revision(status) != revision(page), "there is another report to take over"
    assert 'aria-label="dpo, Accuracy: from 0.500 to 0.750"' in get(address)

    for stage in run.record.stages:
        run.stage(stage, "done", seconds=1.0)
    run.run(state="done")
    page = get(address)
    assert "done, 4 of 4 stages done the run has ended" in words(page)
    assert "not finished" not in page
    assert "http-equiv" not in page
    assert 'data-over="yes"' in get(f"{address}status")


def test_a_run_that_was_killed_is_not_shown_as_one_that_runs(
    run: RunFolder, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stage("sft", "running")
    monkeypatch.setattr(run_state, "is_held", lambda _: False)
    page = words(get(address))
    assert "mine killed, 0 of 4 stages done the run has ended sft killed" in page
    assert "mine ended without recording how; the last sign of life was " in page
    assert "The run is not complete: sft (killed), reward (waiting)" in page
    assert "This run is not finished (killed)" in page


def test_a_report_is_not_drawn_at_every_look(run: RunFolder, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_app, "REPORT_SECONDS", 1000.0)
    run.stage("dpo", "running")
    first = revision(get(address))
    run.steps("dpo", {"step": 1, "seconds": 1.0, "loss": 0.7})
    assert revision(get(f"{address}status")) == first
    run.run(state="interrupted")
    assert revision(get(f"{address}status")) != first, "the last one is drawn at once"


def test_only_the_address_that_was_printed_is_answered_and_only_on_this_machine(address: str) -> None:
    origin = address.rsplit("/", 2)[0]
    assert refusal(f"{origin}/wrong/")[0] == refusal(f"{origin}/")[0] == 403
    assert "`align watch` printed" in refusal(f"{origin}/wrong/status")[1]
    assert refusal(address, Host="evil.example")[0] == 400
    assert "mine" in get(address, Host="localhost")
    request = urllib.request.Request(address, data=b"x=1")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=20)


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    page = get(address)
    assert set(re.findall(r'(?:src|href|action)="([^"#]*)"', page)) == {"data:,", "style.css", "watch.js"}
    assert not re.search(r"<style|style=| on\w+=|<script>", page)
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert "#status" in get(f"{address}style.css")
    assert "replaceWith" in get(f"{address}watch.js")


def test_texts_of_a_run_are_escaped(run: RunFolder, address: str) -> None:
    run.stage("sft", "running")
    run.progress("sft", "<script>alert(1)</script>", 1, 2)
    assert "<script>alert" not in get(address)
    assert "&lt;script&gt;alert(1)" in get(f"{address}status")


def test_a_run_that_is_gone_is_an_error_and_not_an_empty_page(run: RunFolder, address: str) -> None:
    (run.folder / "run.json").unlink()
    code, page = refusal(address)
    assert code == 503
    assert "The run cannot be read:" in page
    assert "no run is recorded here" in page


def test_an_open_page_takes_over_a_new_report_and_stays_where_it_is(
    run: RunFolder, address: str, tmp_path: Path
) -> None:
    if browser() is None:
        pytest.skip("Chromium is not installed: the page cannot be opened")
    run.run(config={"stages": {"dpo": {"beta": 0.1}}})
    run.stage("dpo", "running")
    run.progress("dpo", "training", 10, 40)
    run.steps("dpo", *({"step": n, "seconds": 2.0 * n, "rewards/accuracies": 0.5, "num_tokens": n} for n in range(10)))
    with opened_page() as page:
        page.open(address)
        page.evaluate("document.querySelector('#settings details').open = true")
        page.evaluate("scrollTo({top: 300, behavior: 'instant'})")
        page.evaluate("document.querySelector('main').mark = 'the first'")
        run.progress("dpo", "training", 30, 40)
        run.steps("dpo", {"step": 30, "seconds": 60.0, "rewards/accuracies": 0.9})
        page.wait_for("document.querySelector('main').mark === undefined")
        assert page.evaluate("document.querySelector('#status progress').value") == 0.75
        assert "from 0.500 to 0.900" in page.evaluate("document.querySelector('#curves svg').ariaLabel")
        assert page.evaluate("document.querySelector('#settings details').open")
        assert page.evaluate("scrollY") == 300
        for width in (390, 1280):
            page.picture(tmp_path / f"{width}.png", width=width)
            assert page.evaluate(CUT) == [], f"cut off at {width} pixels"
        run.run(state="done")
        page.wait_for("document.querySelector('#status').textContent.includes('the run has ended')")
        assert page.evaluate("document.title") == "mine · done · align watch"
        assert page.console == []


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_it_ends_with_the_run_if_it_was_asked_to(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(verb, "LINGER_SECONDS", 0.1)
    console = Console(width=300, record=True, quiet=False, file=io.StringIO())
    thread = in_a_thread(lambda: watch(console, None, options=Options(until_done=True), output=run.output))
    deadline = time.monotonic() + 20
    while "http://127.0.0.1:" not in (printed := console.export_text(clear=False)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "mine" in get(re.findall(r"http://\S+", printed)[0])
    thread.join(0.3)
    assert thread.is_alive(), "the run goes on"
    run.run(state="done")
    thread.join(20)
    assert not thread.is_alive()
    assert console.export_text().splitlines()[-1] == "mine: done"


def test_what_cannot_be_watched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with pytest.raises(ConfigError, match="no readable run under"):
        watch(console, None, options=Options(), output=tmp_path)
    run = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=r"no run 'mien' under .*did you mean 'mine'"):
        watch(console, "mien", options=Options(), output=tmp_path)
    with pytest.raises(ConfigError, match="70000 is not a port"):
        watch(console, "mine", options=Options(port=70000), output=tmp_path)
    (run.folder / "run.json").write_text('{"state": 3}')
    with pytest.raises(ArtifactError, match="unreadable"):
        watch(console, "mine", options=Options(), output=tmp_path)
    assert cli.main(["watch", "mine", "--output", str(tmp_path)]) == 7
    assert "run.json: unreadable: state: 3 is not text" in capsys.readouterr().err


def test_the_command_ends_well_at_ctrl_c(run: RunFolder) -> None:
    argv = [sys.executable, "-u", "-m", "alignment.cli", "watch", "--output", str(run.output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "Ctrl-C closes the page, not the run" in line
            assert "mine" in get(re.findall(r"http://\S+", line)[0])
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stdout.read() == "mine: running\n"
        finally:
            process.kill()
