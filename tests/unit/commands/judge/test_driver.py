"""Which answers ``align judge`` serves, and what it refuses before it does."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from rich.console import Console

from alignment.commands.judge.verb import Options, judge
from alignment.commands.shared.page_server import PageServer
from alignment.core.artifacts import MANIFEST
from alignment.core.errors import AlignmentError, Busy, DataError
from alignment.core.locks import held
from alignment.records.evaluation import SAMPLES
from alignment.records.run import RunRecord, StageEntry
from alignment.records.votes import append_vote, read_votes
from tests.judged import finished_run, pair, sample, vote

PAIR = ("sft", "dpo")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run ``mine`` with four prompts, and a run without an evaluation."""
    finished_run(tmp_path, [sample(number) for number in (1, 2, 3)] + [sample(4, sft="same", dpo="same")])
    bare = tmp_path / "runs" / "bare"
    bare.mkdir()
    RunRecord(name="bare", stages={"sft": StageEntry(kind="sft", state="done")}).write(bare)
    return tmp_path


@pytest.fixture
def printed(output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls the command, which serves nothing; returns what it printed."""
    monkeypatch.setattr(PageServer, "serve", lambda page: None)

    def call(run: str = "mine", arms: Sequence[str] = PAIR, **options: Any) -> str:
        console = Console(width=300, record=True)
        assert judge(console, run, arms, options=Options(**options), output=output) == 0
        return console.export_text()

    return call


def test_it_says_what_is_judged_and_where_votes_are(printed: Any, output: Path) -> None:
    file = output / "runs" / "mine" / "evaluate" / "votes.jsonl"
    append_vote(file.parent.mkdir() or file, vote(pair(1, dpo="An earlier answer.")))
    append_vote(file, vote(pair(2)))
    with file.open("ab") as stream:
        stream.write(b'{"pair": "12')
    text = printed()
    assert "stage:sft and stage:dpo: 3 pairs of answers to judge\n" in text
    assert "1 more has two identical answers and counts as a tie without a vote" in text
    assert "1 vote in the file is for other answers of these arms and does not count" in text
    assert "an incomplete vote at the end was removed; it was never confirmed" in text
    assert f"judged: ada 1 of 3; votes: {file}" in text
    assert file.read_bytes().endswith(b"}\n")


def test_too_few_pairs_for_a_win_rate_are_known_before_anybody_votes(printed: Any, output: Path) -> None:
    text = printed()
    assert (
        "note: at most 3 prompts can be judged, but a win rate needs 10; evaluate on more held-out prompts "
        "(stages.evaluate.data), and judge those"
    ) in text
    finished_run(output, [sample(number) for number in range(1, 11)], run="ten", stage="many")
    assert "note: " not in printed("ten")


def test_the_closing_lines_say_what_is_left_and_how_votes_are_counted(printed: Any, output: Path) -> None:
    other = output / "other.jsonl"
    append_vote(other, vote(pair(1)))
    text = printed(votes=str(other))
    assert "nothing is left" not in text
    assert f"to count them: put `judge: {{kind: people, votes: {other}}}` into stages.evaluate of the recipe" in text
    file = output / "runs" / "mine" / "evaluate" / "votes.jsonl"
    file.parent.mkdir()
    assert "to count them" not in printed(), "there are none"
    for number in (1, 2, 3):
        append_vote(file, vote(pair(number)))
    text = printed()
    assert "judged: ada 3 of 3, so nothing is left for ada; votes:" in text
    assert (
        "to count them: put `judge: {kind: people}` into stages.evaluate of the recipe, and run it again; if you only "
        "give it as an override, a later run without it leaves the votes out of its report"
    ) in text


def test_arms_are_named_by_label_or_in_full_and_need_no_naming_where_there_are_two(
    printed: Any, output: Path, tmp_path: Path
) -> None:
    assert "stage:dpo and base: 4 pairs" in printed(arms=["stage:dpo", "base"])
    assert "votes: " + str(tmp_path / "mine.jsonl") in printed(votes=str(tmp_path / "mine.jsonl"))
    finished_run(output, [sample(1), sample(2)], run="two", stage="of_two", arms=("base", "stage:sft"))
    assert "base and stage:sft: 2 pairs" in printed("two", arms=[])


@pytest.mark.parametrize(
    ("run", "arms", "options", "words"),
    [
        ("mien", PAIR, {}, "no run 'mien' under"),
        ("mien", PAIR, {}, "did you mean 'mine'?"),
        ("bare", PAIR, {}, "RUN: the run 'bare' has no finished evaluation"),
        ("mine", PAIR, {"stage": "evalaute"}, "no finished evaluation 'evalaute'; did you mean 'evaluate'?"),
        ("mine", ["sft", "dop"], {}, "--arm: no arm 'dop' in this evaluation; did you mean 'dpo'?"),
        ("mine", ["sft", "stage:sft"], {}, "--arm: 'sft' cannot be compared with itself"),
        ("mine", ["sft"], {}, "--arm: one arm was given, but two are compared"),
        (
            "mine",
            [],
            {},
            "--arm: the evaluation has 3 arms, and two are compared\n  → name two of them, `--arm base --arm sft`",
        ),
        ("mine", ["sft", "dpo", "base"], {}, "--arm: 3 arms were given, but two are compared"),
        ("mine", ["sft"], {}, "its arms: base, sft, dpo"),
        ("mine", PAIR, {"annotator": "a\x1b"}, "--annotator: 'a\\x1b': a name must have 1 to 40 printable characters"),
        ("mine", PAIR, {"port": 70000}, "--port: 70000 is not a port"),
        ("mine", PAIR, {"votes": "votes.txt"}, "--votes: 'votes.txt' cannot store votes"),
        ("mine", PAIR, {"votes": "nowhere/votes.jsonl"}, "name a .jsonl file in a folder that exists"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    printed: Any, run: str, arms: Sequence[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(AlignmentError) as caught:
        printed(run, arms, **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_prompts_of_several_turns_are_refused(printed: Any, output: Path) -> None:
    finished_run(output, [replace(sample(1), later_turns=["And then?"])], run="turns", stage="talk")
    with pytest.raises(DataError, match="has prompts with several turns, but people judge single answers"):
        printed("turns", arms=PAIR)


def test_several_evaluations_are_told_apart_by_name(printed: Any, output: Path) -> None:
    record = RunRecord.read(output / "runs" / "mine")
    entry = record.stages["evaluate"]
    RunRecord(name="mine", stages={"first": entry, "second": entry}).write(output / "runs" / "mine")
    with pytest.raises(AlignmentError, match="the run has several evaluations: first, second"):
        printed()
    assert str(output / "runs/mine/second/votes.jsonl") in printed(stage="second")


def test_damaged_answers_and_votes_are_refused(printed: Any, output: Path) -> None:
    file = output / "runs" / "mine" / "evaluate" / "votes.jsonl"
    file.parent.mkdir()
    file.write_text("not a vote\n")
    with pytest.raises(AlignmentError, match=r"votes\.jsonl:1: not JSON") as caught:
        printed()
    assert caught.value.exit_code == 3
    artifact = output / "artifacts" / "evaluate-00000000"
    text = (artifact / SAMPLES).read_text()
    (artifact / SAMPLES).write_text(text.replace("from sft", "from xxx"))
    with pytest.raises(AlignmentError, match="content differs from its manifest") as caught:
        printed()
    assert caught.value.exit_code == 7
    assert (artifact / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("missing", "command"), [("starlette", "'starlette>=1,<2'"), ("uvicorn", "'uvicorn>=0.34,<1'")]
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    printed: Any, monkeypatch: pytest.MonkeyPatch, missing: str, command: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(AlignmentError) as caught:
        printed()
    assert f"pip install {command}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_of_votes_must_be_a_file(printed: Any, output: Path) -> None:
    os.mkfifo(output / "pipe.jsonl")
    with pytest.raises(AlignmentError, match="cannot store votes"):
        printed(votes=str(output / "pipe.jsonl"))


def test_a_second_server_on_the_same_votes_or_port_is_refused(printed: Any, output: Path) -> None:
    file = output / "votes.jsonl"
    (output / "link.jsonl").symlink_to(file)
    for name in ("votes.jsonl", "link.jsonl"):
        with held(output / "votes.jsonl.lock", wait=False), pytest.raises(Busy, match="in use by process"):
            printed(votes=str(output / name))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Busy, match=f"another program already listens on port {port}"):
            printed(port=port)
    printed(port=port)
    assert not file.exists()


@contextmanager
def served(output: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a user starts it, and the address that it prints."""
    argv = [
        sys.executable,
        "-m",
        "alignment.cli",
        "judge",
        "mine",
        "--arm",
        "sft",
        "--arm",
        "dpo",
        "--annotator",
        "ada",
    ]
    with subprocess.Popen(
        [*argv, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    ) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("judge at ")), "")
            assert line, "it ended without serving"
            yield process, line.split()[2]
        finally:
            process.kill()


def vote_for(address: str, key: str) -> int:
    """Sends a vote as the page does; returns the status of the page that it leads to."""
    form = urlencode({"annotator": "ada", "pair": key, "choice": "1"}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}vote", data=form), timeout=20) as answer:
        return int(answer.status)


def test_a_served_page_stores_votes_and_ends_well_at_ctrl_c(output: Path) -> None:
    file = output / "runs" / "mine" / "evaluate" / "votes.jsonl"
    with served(output) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.rsplit("/", 2)[0] + "/wrong/", timeout=20)
        assert vote_for(address, pair(1).key) == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert "judged: ada 1 of 3" in process.stdout.read()
    with served(output) as (process, address):
        assert vote_for(address, pair(2).key) == 200
        process.kill()
        process.wait(20)
    with served(output) as (_, address):
        assert vote_for(address, pair(3).key) == 200
    assert [entry.id for entry in read_votes(file)] == ["p1", "p2", "p3"]
