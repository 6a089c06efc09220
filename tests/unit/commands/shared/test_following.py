"""``align status --follow`` and ``align watch``: lines and a page beside a run whose files change."""

from __future__ import annotations

import html
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from alignment import cli
from alignment.commands import status as status_verb
from alignment.commands.shared import following
from alignment.commands.shared.listening import listening
from alignment.commands.shared.page_server import PageServer
from alignment.commands.status import follow
from alignment.commands.watch import live_app, verb
from alignment.commands.watch.live_app import application
from alignment.commands.watch.verb import watch
from alignment.core.errors import AlignmentError
from alignment.core.locks import held
from alignment.pipeline.execute import run_state
from tests.browser import CUT, browser, opened_page
from tests.running import RunFolder

ROOT = Path(__file__).parents[4]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    with held(made.folder / "lock", wait=False):
        yield made


Follow = Callable[..., list[str]]


@pytest.fixture
def followed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follows the run, to which these things happen between two looks; returns the lines that are printed."""

    def call(*happens: Callable[[], object]) -> list[str]:
        coming = iter(happens)
        monkeypatch.setattr(status_verb.time, "sleep", lambda _: next(coming)())
        screen = io.StringIO()
        follow(Console(file=screen, width=100), run.output, None)
        assert next(coming, None) is None, "it ended before the run"
        return screen.getvalue().splitlines()

    return call


def test_a_run_is_followed_from_the_middle_to_its_end(run: RunFolder, followed: Follow) -> None:
    run.stage("sft", "done", seconds=41.0)
    run.stage("reward", "running")
    run.progress("reward", "training", 10, 100, loss=0.7)
    run.status("reward", state="done", exit_code=0, notes=["TensorBoard failed"])

    def fails() -> None:
        run.stage("reward", "done", seconds=62.0)
        run.status("dpo", state="failed", exit_code=6, error="the loss is NaN at step 3")
        run.stage("dpo", "failed", seconds=2.0)
        run.run(state="failed")

    lines = followed(
        lambda: run.progress("reward", "training", 12, 100, loss=0.7),
        lambda: run.progress("reward", "training", 25, 100, loss=0.6),
        fails,
    )
    assert lines[:2] == ["reward: starts (no result yet)", "reward: training 10/100  loss 0.7"]
    assert lines[2].startswith("reward: training 25/100, ")
    assert lines[3:9] == [
        "reward: done  1 min 02 s  reward-5f0e9b1c",
        "dpo: failed  2 s",
        "reward: TensorBoard failed",
        "dpo: the loss is NaN at step 3",
        f"  log: {run.folder / 'dpo/log.txt'}",
        "mine: failed",
    ]


def test_ctrl_c_ends_the_view_and_not_the_run(run: RunFolder, followed: Follow) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert followed(interrupt) == ["mine continues; `align status mine` shows its progress"]


def test_a_run_of_another_machine_is_followed_although_its_lock_is_not_seen_here(
    run: RunFolder, followed: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stage("sft", "running")
    monkeypatch.setattr(run_state, "is_held", lambda _: False)
    monkeypatch.setattr(run_state, "last_host", lambda _: "node7")
    lines = followed(lambda: None, lambda: run.run(state="done"))
    assert lines[0] == "sft: starts (no result yet)"
    assert "cannot be seen from here (it was started on node7); " in lines[1]
    assert lines[2:4] == ["if it has ended, run the same command to continue", "mine: done"]


def test_jobs_that_wait_say_why(run: RunFolder, followed: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following.slurm_jobs, "read_jobs", lambda _: {"dpo": "12"})
    states = {"sft": "job 11 RUNNING", "dpo": "job 12 PENDING (Resources)"}
    monkeypatch.setattr(following.slurm_jobs, "states", lambda _: states)
    lines = followed(lambda: None, lambda: None, lambda: run.run(state="done"))
    assert lines[:2] == ["dpo: job 12 PENDING (Resources)", "mine: done"]


def test_a_run_is_found_by_name_or_as_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status(*words: str, code: int = 0) -> str:
        assert cli.main(["status", "--follow", *words, "--output", str(tmp_path)]) == code
        return "".join(capsys.readouterr())

    assert "no readable run" in status(code=2)
    RunFolder(tmp_path, "first", state="done", started="2026-11-28T10:00:00+00:00")
    RunFolder(tmp_path, "second", state="done", started="2026-11-28T12:00:00+00:00")
    (tmp_path / "runs/torn").mkdir()
    (tmp_path / "runs/torn/run.json").write_text("{")
    assert "second: done" in status()
    assert "did you mean 'first'?" in status("frist", code=2)
    RunFolder(tmp_path).stage("sft", "running")  # it was killed, and is not followed for ever
    printed = status()
    assert "sft: killed" in printed
    assert "mine: killed\nmine ended without recording how; the last sign of life was " in printed
    assert "\nrun the same command to continue\n" in printed


@pytest.fixture
def page(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The page of the run, whose report is drawn as soon as something has changed."""
    monkeypatch.setattr(live_app, "REPORT_SECONDS", 0.0)
    return TestClient(application(run.folder, "token"), base_url="http://127.0.0.1:8000/token/")


def text_of(page: str) -> str:
    """With one space for any white space."""
    return " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split())


def revision(page: str) -> str:
    return re.findall(r'data-revision="([0-9a-f]+)"', page)[0]


def test_the_page_follows_a_run_to_its_end(run: RunFolder, page: TestClient) -> None:
    run.stage("dpo", "running")
    run.progress("dpo", "training", 10, 40, loss=0.7)
    rows = [{"step": n, "seconds": 2.0 * n, "num_tokens": 500 * n, "rewards/accuracies": 0.5} for n in (9, 10)]
    run.steps("dpo", *rows)
    first = page.get("").text
    text = text_of(first)
    assert "This run is not finished (running): 0 of 4 stages have a result." in text
    assert "dpo running training · 10/40" in text
    assert "accuracy 0.5 ▄▄ 250 tokens/s" in text
    assert "ppo waiting waits for reward" in text
    assert 'aria-label="dpo, Accuracy: from 0.500 to 0.500"' in first, "the report has the curve so far"
    assert '<meta http-equiv="refresh"' in first

    run.progress("dpo", "training", 20, 40, loss=0.7)
    run.steps("dpo", {"step": 20, "seconds": 40.0, "num_tokens": 10_000, "rewards/accuracies": 0.75})
    status = page.get("status").text
    assert "training · 20/40" in text_of(status)
    assert revision(status) != revision(first), "there is another report to take over"
    assert 'aria-label="dpo, Accuracy: from 0.500 to 0.750"' in page.get("").text

    for stage in run.record.stages:
        run.stage(stage, "done", seconds=1.0)
    run.run(state="done")
    last = page.get("").text
    assert "done, 4 of 4 stages done the run has ended" in text_of(last)
    assert "not finished" not in last
    assert "http-equiv" not in last
    assert 'data-over="yes"' in page.get("status").text


def test_a_run_that_was_killed_is_not_shown_as_one_that_runs(
    run: RunFolder, page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stage("sft", "running")
    monkeypatch.setattr(run_state, "is_held", lambda _: False)
    text = text_of(page.get("").text)
    assert "mine killed, 0 of 4 stages done the run has ended sft killed" in text
    assert "mine ended without recording how; the last sign of life was " in text
    assert "The run is not complete: sft (killed), reward (waiting)" in text
    assert "This run is not finished (killed)" in text


def test_a_report_is_not_drawn_at_every_look(run: RunFolder, page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_app, "REPORT_SECONDS", 1000.0)
    run.stage("dpo", "running")
    first = revision(page.get("").text)
    run.steps("dpo", {"step": 1, "seconds": 1.0, "loss": 0.7})
    assert revision(page.get("status").text) == first
    run.run(state="interrupted")
    assert revision(page.get("status").text) != first, "the last one is drawn at once"


def test_the_page_loads_nothing_from_elsewhere_and_texts_are_escaped(run: RunFolder, page: TestClient) -> None:
    run.stage("sft", "running")
    run.progress("sft", "<script>alert(1)</script>", 1, 2)
    assert page.get("http://127.0.0.1:8000/wrong/status").status_code == 403
    assert page.get("", headers={"host": "evil.example"}).status_code == 400
    answer = page.get("")
    assert set(re.findall(r'(?:src|href|action)="([^"#]*)"', answer.text)) == {"data:,", "style.css", "watch.js"}
    assert not re.search(r"<style|style=| on\w+=|<script>", answer.text)
    assert "&lt;script&gt;alert(1)" in page.get("status").text
    assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert "#status" in page.get("style.css").text
    assert "replaceWith" in page.get("watch.js").text


def test_a_run_that_is_gone_is_an_error_and_not_an_empty_page(run: RunFolder, page: TestClient) -> None:
    (run.folder / "run.json").unlink()
    answer = page.get("")
    assert answer.status_code == 503
    assert "no run is recorded here" in answer.text


@pytest.mark.skipif(browser() is None, reason="Chromium is not installed: the page cannot be opened")
def test_an_open_page_takes_over_a_new_report_and_stays_where_it_is(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_app, "REPORT_SECONDS", 0.0)
    run.run(config={"stages": {"dpo": {"beta": 0.1}}})
    run.stage("dpo", "running")
    run.progress("dpo", "training", 10, 40)
    run.steps("dpo", *({"step": n, "seconds": 2.0 * n, "rewards/accuracies": 0.5, "num_tokens": n} for n in range(10)))
    with listening(0) as listener, opened_page() as page:
        server = PageServer(lambda token: application(run.folder, token), listener)
        thread = in_a_thread(server.serve)
        page.open(server.address)
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
        server.stop()
        thread.join(20)


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def get(text: str) -> str:
    with urllib.request.urlopen(re.findall(r"http://\S+", text)[0], timeout=20) as answer:
        return answer.read().decode()


def test_it_ends_with_the_run_if_it_was_asked_to(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(verb, "LINGER_SECONDS", 0.1)
    console = Console(width=300, record=True, quiet=False, file=io.StringIO())
    thread = in_a_thread(lambda: watch(console, None, until_done=True, output=run.output))
    deadline = time.monotonic() + 20
    while "http://127.0.0.1:" not in (printed := console.export_text(clear=False)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "mine" in get(printed)
    thread.join(0.1)
    assert thread.is_alive(), "the run goes on"
    run.run(state="done")
    thread.join(20)
    assert not thread.is_alive()
    assert console.export_text().splitlines()[-1] == "mine: done"


def test_what_cannot_be_watched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: str | None, words: str, **options: int) -> None:
        with pytest.raises(AlignmentError, match=words):
            watch(Console(), run, output=tmp_path, **options)

    refused(None, "no readable run")
    run = RunFolder(tmp_path)
    refused("mien", "did you mean 'mine'")
    refused("mine", "70000 is not a port", port=70000)
    (run.folder / "run.json").write_text('{"state": 3}')
    assert cli.main(["watch", "mine", "--output", str(tmp_path)]) == 7
    assert "run.json: unreadable: state: 3 is not text" in capsys.readouterr().err


def test_the_command_ends_well_at_ctrl_c(run: RunFolder) -> None:
    argv = [sys.executable, "-u", "-m", "alignment.cli", "watch", "--output", str(run.output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert "Ctrl-C closes the page, not the run" in line
            assert "mine" in get(line)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stdout.read() == "mine: running\n"
        finally:
            process.kill()
