"""``align judge``: who sees which pair when, what the page answers, and what is refused without losing votes."""

from __future__ import annotations

import errno
import html
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from alignment.commands.judge import verb as judge_verb
from alignment.commands.judge.verb import Ballots, Choice, Refused, annotator_name, judge
from alignment.commands.judge.web_app import application
from alignment.commands.shared.listening import listening
from alignment.commands.shared.page_server import PageServer
from alignment.core.errors import AlignmentError, Busy, ConfigError
from alignment.core.locks import held
from alignment.evaluation.answer_pairs import AnswerPair, queue, shown_first
from alignment.records.evaluation import SAMPLES
from alignment.records.run import RunRecord, StageEntry
from alignment.records.votes import TIE, append_vote, read_votes
from tests.browser import CUT, Page, browser, opened_page
from tests.judged import ARMS, DPO, SFT, finished_run, pair, sample, vote

PAIRS = [pair(number) for number in range(1, 7)]
BOTH = ("sft", "dpo")
TOKEN = "the-token"
ADDRESS = "http://127.0.0.1:8000"
NewClient = Callable[..., TestClient]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "votes.jsonl"


@pytest.fixture
def ballots(file: Path) -> Ballots:
    return Ballots(file, PAIRS, ARMS)


def cast(ballots: Ballots, annotator: str, choice: Choice = Choice.first) -> str:
    ballot = ballots.standing(annotator)
    ballots.vote(annotator, ballot.pair.key, choice)
    return ballot.pair.key


def test_every_annotator_sees_every_pair_once_and_all_in_one_order(ballots: Ballots, file: Path) -> None:
    ada = [cast(ballots, "ada") for _ in PAIRS]
    assert sorted(ada) == sorted(about.key for about in PAIRS)
    assert ballots.standing("ada").pair is None
    bo = [cast(ballots, "bo") for _ in range(2)]
    again = Ballots(file, PAIRS, ARMS)
    assert (again.standing("bo").judged, again.standing("ada").judged, again.standing("cy").judged) == (2, 6, 0)
    bo += [cast(again, "bo") for _ in range(4)]
    assert bo == ada
    assert again.judged() == {"ada": 6, "bo": 6}


def test_a_key_stands_for_the_answer_that_was_shown_there(ballots: Ballots, file: Path) -> None:
    expected = {}
    for choice in (*Choice, *Choice):
        ballot = ballots.standing("ada")
        first = shown_first(ballot.pair, "ada")
        second = next(arm for arm in ARMS if arm != first)
        assert ballot.answers == (ballot.pair.answers[first], ballot.pair.answers[second])
        ballots.vote("ada", ballot.pair.key, choice)
        preferred = {Choice.first: first, Choice.second: second, Choice.tie: TIE}[choice]
        expected[ballot.pair.key] = (preferred, first)
    assert {entry.pair: (entry.preferred, entry.shown_first) for entry in read_votes(file)} == expected
    assert len({first for _, first in expected.values()}) == 2, "no arm is always first"


def test_undo_takes_ones_own_last_vote_back_and_shows_that_pair_again(ballots: Ballots, file: Path) -> None:
    cast(ballots, "ada")
    last = cast(ballots, "ada")
    cast(ballots, "bo")
    ballots.undo("ada")
    standing = ballots.standing("ada")
    assert (standing.judged, standing.pair.key) == (1, last)
    assert [entry.annotator for entry in read_votes(file)] == ["ada", "bo"]
    ballots.vote("ada", last, Choice.tie)
    ballots.undo("bo")
    with pytest.raises(Refused, match="bo has no vote to undo"):
        ballots.undo("bo")


def test_equal_answers_and_votes_on_other_answers_are_counted_apart(file: Path) -> None:
    append_vote(file, vote(pair(1, dpo="An earlier answer.")))
    append_vote(file, vote(PAIRS[1]))
    ballots = Ballots(file, [*PAIRS, pair(9, sft="same", dpo=" same")], ARMS)
    assert (ballots.total, ballots.num_same, ballots.num_stale) == (6, 1, 1)
    assert ballots.judged() == {"ada": 1}
    ballots.undo("ada")
    with pytest.raises(Refused):
        ballots.undo("ada")
    assert [entry.answers[DPO] for entry in read_votes(file)] == ["An earlier answer."], "nobody's to undo"


@pytest.mark.parametrize(
    ("text", "name"),
    [("  Ada   Lovelace ", "Ada Lovelace"), ("Zoe\u0308", "Zoë"), ("李" * 40, "李" * 40)]
    + [(text, None) for text in ("", "   ", "a" * 41, "a\x1bb", "a\u202eb", "\ud800")],
)
def test_a_name_is_readable_text_without_superfluous_spaces(text: str, name: str | None) -> None:
    if name is not None:
        assert annotator_name(text) == name
    else:
        with pytest.raises(ValueError, match="1 to 40 printable characters"):
            annotator_name(text)


@pytest.fixture
def new_client(file: Path) -> NewClient:
    def client(*pairs: AnswerPair, annotator: str | None = None) -> TestClient:
        app = application(Ballots(file, pairs or PAIRS[:3], ARMS), TOKEN, run="mine", annotator=annotator)
        return TestClient(app, base_url=f"{ADDRESS}/{TOKEN}/", follow_redirects=False)

    return client


@pytest.fixture
def client(new_client: NewClient) -> TestClient:
    return new_client()


def shown_pair(client: TestClient, annotator: str = "ada") -> str:
    return re.findall(r'name="pair" value="([0-9a-f]{32})"', client.get(f"judge?annotator={annotator}").text)[0]


def test_votes_lead_to_the_next_pair_and_to_the_end_and_undo_back(client: TestClient, file: Path) -> None:
    page = client.get("judge?annotator=ada").text
    first, second = re.findall(r'<div class="words">It is \d from (\w+)\.</div>', page)
    key = shown_pair(client)
    answer = client.post("vote", data={"annotator": "ada", "pair": key, "choice": "2"})
    assert (answer.status_code, answer.headers["location"]) == (303, "judge?annotator=ada")
    (stored,) = read_votes(file)
    assert (stored.shown_first, stored.preferred) == (f"stage:{first}", f"stage:{second}")
    assert {stored.shown_first, stored.preferred} == {SFT, DPO}
    assert shown_pair(client) != key
    assert "1 of 3 judged" in client.get("judge?annotator=ada").text
    assert client.post("undo", data={"annotator": "ada"}).status_code == 303
    assert shown_pair(client) == key
    assert read_votes(file) == []
    for choice in "120":
        client.post("vote", data={"annotator": "ada", "pair": shown_pair(client), "choice": choice})
    assert "All pairs are judged" in client.get("judge?annotator=ada").text
    assert len(read_votes(file)) == 3
    assert "ada</bdi></a> (3 of 3)" in client.get("").text, "the first page names who has judged"


def test_only_the_address_with_its_token_is_answered_and_only_on_this_machine(client: TestClient, file: Path) -> None:
    form = {"annotator": "ada", "pair": shown_pair(client), "choice": "1"}
    for path in ("/", "/the-toke/", "/wrong/judge?annotator=ada"):
        answer = client.get(f"{ADDRESS}{path}")
        assert (answer.status_code, "judge?" in answer.text) == (403, False)
    assert client.post(f"{ADDRESS}/wrong/vote", data=form).status_code == 403
    assert not file.exists()
    answer = client.get(f"{ADDRESS}/{TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{TOKEN}/")
    for host, status in (("evil.example:8000", 400), ("127.0.0.1.evil.example", 400), ("localhost:8000", 200)):
        assert client.get("judge?annotator=ada", headers={"host": host}).status_code == status
    for path in ("judge?annotator=ada", "style.css", "nothing"):
        headers = client.get(path).headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert (headers["referrer-policy"], headers["cache-control"]) == ("no-referrer", "no-store")
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere_and_hides_whose_answers_they_are(client: TestClient) -> None:
    page = client.get("judge?annotator=ada").text
    loaded = set(re.findall(r'(?:src|href|action)="([^"]*)"', page))
    assert loaded == {"data:,", "style.css", "keys.js", "./?who", "undo", "vote"}
    assert not re.search(r"<style|style=| on\w+=|<script>", page)
    assert client.get("keys.js").headers["content-type"].startswith("text/javascript")
    assert "footer.vote" in client.get("style.css").text
    for text in (page, client.get("").text):
        assert not re.search(r"stage:|\bdpo\b|\bsft\b", text.replace("from sft.", "").replace("from dpo.", ""))


HOSTILE = "<script>alert(1)</script>\x1b]0;title\x07 \x1b[31m \u202egnp.exe </div>&amp; 'q' \"d\""


def test_texts_are_escaped_and_their_control_characters_shown(new_client: NewClient) -> None:
    turns = [{"role": "<b>user</b>", "content": HOSTILE}]
    texts = pair(1, sft=HOSTILE, dpo=HOSTILE + "!")
    client = new_client(AnswerPair(key=texts.key, messages=turns, answers=texts.answers))
    page = client.get("judge?annotator=<i>ada").text
    assert not any(markup in page for markup in ("<script>alert", "<b>user", "<i>ada"))
    assert not set("\x1b\x07\u202e") & set(page)
    readable = re.sub("[\x1b\x07\u202e]", "\ufffd", HOSTILE)
    assert html.unescape(page).count(readable) == 3


def test_empty_answers_and_calls_of_tools_are_shown(new_client: NewClient) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    turns = [{"role": "user", "content": "2 + 2?"}, call, {"role": "tool", "content": "4"}]
    client = new_client(AnswerPair(key="0" * 32, messages=turns, answers={SFT: " ", DPO: "Four."}))
    page = html.unescape(client.get("judge?annotator=ada").text)
    assert "The answer is empty." in page
    assert '"name": "add"' in page


@pytest.mark.parametrize(
    ("form", "status", "words"),
    [
        ({"annotator": "ada", "pair": "0" * 32, "choice": "1"}, 404, "no such pair"),
        ({"annotator": "ada", "pair": "KEY", "choice": "3"}, 400, "A vote is 1, 2 or 0"),
        ({"annotator": "a\x1b", "pair": "KEY", "choice": "1"}, 400, "1 to 40 printable characters"),
        ({"annotator": "ada", "pair": "x" * 5000, "choice": "1"}, 400, "too long"),
        ({f"field{number}": "1" for number in range(20)}, 400, "too many fields"),
        ({}, 400, "1 to 40 printable characters"),
    ],
)
def test_a_vote_that_cannot_be_is_refused_and_nothing_is_written(
    client: TestClient, file: Path, form: dict[str, str], status: int, words: str
) -> None:
    key = shown_pair(client)
    answer = client.post("vote", data={name: key if value == "KEY" else value for name, value in form.items()})
    assert answer.status_code == status
    assert words in answer.text
    assert not file.exists()


def test_what_cannot_be_stored_is_refused_and_earlier_votes_stay(
    client: TestClient, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"annotator": "ada", "pair": shown_pair(client), "choice": "1"}

    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(judge_verb, "append_vote", full)
        answer = client.post("vote", data=form)
    assert (answer.status_code, "No space left on device" in answer.text) == (507, True)
    assert "0 of 3 judged" in client.get("judge?annotator=ada").text
    assert client.post("vote", data=form).status_code == 303
    before = file.read_bytes()
    answer = client.post("vote", data={**form, "choice": "2"})
    assert (answer.status_code, 'href="judge?annotator=ada"' in answer.text) == (409, True)
    assert client.post("undo", data={"annotator": "bo"}).status_code == 409
    assert file.read_bytes() == before
    file.write_bytes(before + b"by hand\n")
    answer = client.post("undo", data={"annotator": "ada"})
    assert (answer.status_code, "changed by somebody else" in answer.text) == (500, True)
    assert file.read_bytes() == before + b"by hand\n"


def test_a_name_from_the_command_line_is_not_asked_for(new_client: NewClient) -> None:
    client = new_client(annotator="Ada L.")
    answer = client.get("")
    assert (answer.status_code, answer.headers["location"]) == (303, "judge?annotator=Ada+L.")
    assert "Your name" in client.get("?who").text
    assert "Your name" in client.get("judge?annotator=").text
    assert client.get("vote").status_code == 405


LONG = [pair(number, dpo=f"It is {number}. " * (1 + 40 * (number % 5 == 0))) for number in range(1, 21)]
KEYS = "1202101220"
READY = "document.readyState === 'complete'"


@contextmanager
def serving(file: Path) -> Iterator[str]:
    """The page on a free port until the block ends; yields its address."""
    with listening(0) as listener:
        ballots = Ballots(file, LONG, ARMS)
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


def wait_for_count(page: Page, number: int) -> None:
    page.wait_for(f"document.querySelector('.count')?.textContent.startsWith('{number} of') && {READY}")


def press(page: Page, keys: str, *, judged: int) -> None:
    for number, key in enumerate(keys, start=judged + 1):
        page.press(key)
        wait_for_count(page, number)


@pytest.mark.skipif(browser() is None, reason="Chromium is not installed: the page cannot be opened")
def test_people_judge_by_keyboard_stop_and_go_on(file: Path, tmp_path: Path) -> None:
    with opened_page() as page:
        with serving(file) as address:
            begin(page, address, "ada")
            press(page, KEYS, judged=0)
            page.press("u")
            wait_for_count(page, 9)
            assert len(read_votes(file)) == 9
            page.press("x", times=3)
            press(page, KEYS[9], judged=9)
            page.press("1", times=5, held=True)
            wait_for_count(page, 11)
            for width in (390, 1280):
                page.picture(tmp_path / f"{width}.png", width=width)
                assert page.evaluate(CUT) == [], f"cut off at {width} pixels"
        with serving(file) as address:
            begin(page, address, "ada")
            assert "11 of 20 judged" in page.text()
            press(page, KEYS[1:], judged=11)
            assert "All pairs are judged" in page.text()
        assert page.console == []
    meant = ["0" if vote.preferred == TIE else "21"[vote.preferred == vote.shown_first] for vote in read_votes(file)]
    assert "".join(meant) == KEYS + "1" + KEYS[1:]
    assert [vote.pair for vote in read_votes(file)] == [about.key for about in queue(LONG)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run ``mine`` with four prompts, one without an evaluation, and one whose prompts have several turns."""
    finished_run(tmp_path, [sample(number) for number in (1, 2, 3)] + [sample(4, sft="same", dpo="same")])
    finished_run(tmp_path, [replace(sample(1), later_turns=["And then?"])], run="turns", stage="talk")
    bare = tmp_path / "runs" / "bare"
    bare.mkdir()
    RunRecord(name="bare", stages={"sft": StageEntry(kind="sft", state="done")}).write(bare)
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path


@pytest.fixture
def votes_file(output: Path) -> Path:
    folder = output / "runs" / "mine" / "evaluate"
    folder.mkdir()
    return folder / "votes.jsonl"


@pytest.fixture
def printed(output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls the command, which serves nothing; returns what it printed."""
    monkeypatch.setattr(PageServer, "serve", lambda page: None)

    def call(run: str = "mine", arms: Sequence[str] = BOTH, **options: Any) -> str:
        console = Console(width=300, record=True)
        assert judge(console, run, arms, output=output, **options) == 0
        return re.sub(r"judge at \S+", "judge at ADDRESS", console.export_text())

    return call


def test_it_says_what_is_judged_what_is_left_and_where_votes_are(printed: Any, votes_file: Path) -> None:
    assert "to count them" not in printed(), "there are none"
    append_vote(votes_file, vote(pair(1, dpo="An earlier answer.")))
    append_vote(votes_file, vote(pair(2)))
    with votes_file.open("ab") as stream:
        stream.write(b'{"pair": "12')
    assert printed() == (
        f"{votes_file}: an incomplete vote at the end was removed; it was never confirmed\n"
        "stage:sft and stage:dpo: 3 pairs of answers to judge\n"
        "1 more has two identical answers and counts as a tie without a vote\n"
        "1 vote in the file is for other answers of these arms and does not count\n"
        "note: at most 3 prompts can be judged, but a win rate needs 10; evaluate on more held-out prompts "
        "(stages.evaluate.data), and judge those\n"
        f"votes: {votes_file}\n"
        "judge at ADDRESS (Ctrl-C ends)\n"
        f"judged: ada 1 of 3; votes: {votes_file}\n"
        "to count them: put `judge: {kind: people}` into stages.evaluate of the recipe, and run it again; if you only "
        "give it as an override, a later run without it leaves the votes out of its report\n"
    )
    for number in (1, 3):
        append_vote(votes_file, vote(pair(number)))
    assert "judged: ada 3 of 3, so nothing is left for ada; votes:" in printed()


def test_votes_arms_and_evaluations_are_those_that_are_named(printed: Any, output: Path) -> None:
    assert "stage:dpo and base: 4 pairs" in printed(arms=["stage:dpo", "base"])
    other = output / "other.jsonl"
    append_vote(other, vote(pair(1)))
    text = printed(votes=str(other))
    assert f"put `judge: {{kind: people, votes: {other}}}` into stages.evaluate" in text
    samples = [sample(number) for number in range(1, 11)]
    finished_run(output, samples, run="two", stage="of_two", arms=("base", "stage:sft"))
    text = printed("two", arms=[])
    assert "base and stage:sft: 10 pairs" in text
    assert "note: " not in text
    entry = RunRecord.read(output / "runs" / "mine").stages["evaluate"]
    RunRecord(name="mine", stages={"first": entry, "second": entry}).write(output / "runs" / "mine")
    with pytest.raises(AlignmentError, match="several evaluations: first, second"):
        printed()
    assert str(output / "runs/mine/second/votes.jsonl") in printed(stage="second")


@pytest.mark.parametrize(
    ("run", "arms", "options", "where", "word", "code"),
    [
        ("mien", BOTH, {}, "", "'mine'", 2),
        ("bare", BOTH, {}, "bare", "no finished evaluation", 2),
        ("turns", BOTH, {}, SAMPLES, "several turns", 3),
        ("mine", BOTH, {"stage": "evalaute"}, "--stage", "'evaluate'", 2),
        ("mine", ["sft", "dop"], {}, "--arm", "'dpo'", 2),
        ("mine", ["sft"], {}, "--arm", "its arms: base, sft, dpo", 2),
        ("mine", [], {}, "--arm", "`--arm base --arm sft`", 2),
        ("mine", ["sft", "dpo", "base"], {}, "--arm", "3 arms were given", 2),
        ("mine", BOTH, {"votes": "OUTPUT/pipe.jsonl"}, "--votes", "cannot store", 2),
    ],
)
def test_what_cannot_be_judged_is_refused(
    printed: Any, output: Path, run: str, arms: Sequence[str], options: dict[str, Any], where: str, word: str, code: int
) -> None:
    if "votes" in options:
        options = {"votes": options["votes"].replace("OUTPUT", str(output))}
    with pytest.raises(AlignmentError) as caught:
        printed(run, arms, **options)
    assert word in str(caught.value)
    assert (caught.value.where.endswith(where), caught.value.exit_code) == (True, code)


def test_damaged_answers_and_votes_are_refused(printed: Any, output: Path, votes_file: Path) -> None:
    votes_file.write_text("not a vote\n")
    with pytest.raises(AlignmentError, match=r"votes\.jsonl:1: not JSON") as caught:
        printed()
    assert caught.value.exit_code == 3
    samples = output / "artifacts" / "evaluate-00000000" / SAMPLES
    samples.write_text(samples.read_text().replace("from sft", "from xxx"))
    with pytest.raises(AlignmentError, match="content differs from its manifest") as caught:
        printed()
    assert caught.value.exit_code == 7


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(ConfigError, match="pip install 'uvicorn>="):
        printed()


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
        with pytest.raises(Busy, match=f"port {port}"):
            printed(port=port)
    printed(port=port)
    assert not file.exists()


def test_a_served_page_stores_votes_and_ends_well_at_ctrl_c(output: Path) -> None:
    """The command as a user starts it."""
    argv = [sys.executable, "-m", "alignment.cli", "judge", "mine", "--arm=sft", "--arm=dpo", "--annotator=ada"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*argv, "--output", str(output)], **pipes) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("judge at "))
            address = line.split()[2]
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(address.rsplit("/", 2)[0] + "/wrong/", timeout=20)
            form = urlencode({"annotator": "ada", "pair": pair(2).key, "choice": "1"}).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{address}vote", data=form), timeout=20) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert "judged: ada 1 of 3" in process.stdout.read()
        finally:
            process.kill()
    assert [entry.id for entry in read_votes(output / "runs/mine/evaluate/votes.jsonl")] == ["p2"]
