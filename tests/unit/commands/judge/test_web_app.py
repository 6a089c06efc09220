"""The page as requests see it: what it answers to whom, and what it refuses without losing anything."""

from __future__ import annotations

import errno
import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from alignment.commands.judge import ballots as ballots_module
from alignment.commands.judge.ballots import Ballots
from alignment.commands.judge.web_app import application
from alignment.evaluation.answer_pairs import AnswerPair
from alignment.records.votes import Vote, read_votes
from tests.judged import ARMS, DPO, SFT, pair

TOKEN = "the-token"
NewClient = Callable[..., TestClient]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "votes.jsonl"


@pytest.fixture
def new_client(file: Path) -> NewClient:
    """A client of the page, by default on three pairs and at the right address."""

    def client(*pairs: AnswerPair, annotator: str | None = None, base: str = "http://127.0.0.1:8000") -> TestClient:
        ballots = Ballots(file, pairs or [pair(number) for number in (1, 2, 3)], ARMS)
        app = application(ballots, TOKEN, run="mine", annotator=annotator)
        return TestClient(app, base_url=f"{base}/{TOKEN}/", follow_redirects=False)

    return client


@pytest.fixture
def client(new_client: NewClient) -> TestClient:
    return new_client()


def shown_pair(client: TestClient, annotator: str = "ada") -> str:
    """The pair that the page asks the annotator about."""
    return re.findall(r'name="pair" value="([0-9a-f]{32})"', client.get(f"judge?annotator={annotator}").text)[0]


def test_a_vote_leads_to_the_next_pair_and_undo_back(client: TestClient, file: Path) -> None:
    first = shown_pair(client)
    answer = client.post("vote", data={"annotator": "ada", "pair": first, "choice": "2"})
    assert (answer.status_code, answer.headers["location"]) == (303, "judge?annotator=ada")
    assert shown_pair(client) != first
    assert "1 of 3 judged" in client.get("judge?annotator=ada").text
    assert client.post("undo", data={"annotator": "ada"}).status_code == 303
    assert shown_pair(client) == first
    assert read_votes(file) == []


def test_all_pairs_lead_to_the_end(client: TestClient, file: Path) -> None:
    for choice in "120":
        client.post("vote", data={"annotator": "ada", "pair": shown_pair(client), "choice": choice})
    page = client.get("judge?annotator=ada").text
    assert "All pairs are judged" in page
    assert len(read_votes(file)) == 3
    assert "ada</bdi></a> (3 of 3)" in client.get("").text, "the first page names who has judged"


@pytest.mark.parametrize("path", ["/", "/wrong/", "/the-toke/", "/the-token2/", "/wrong/judge?annotator=ada", "/é/"])
def test_without_the_token_nothing_is_answered(new_client: NewClient, path: str) -> None:
    answer = new_client().get(f"http://127.0.0.1:8000{path}")
    assert answer.status_code == 403
    assert "`align judge` printed" in answer.text
    assert "judge?" not in answer.text


def test_a_vote_without_the_token_is_not_stored(new_client: NewClient, file: Path) -> None:
    client = new_client()
    key = shown_pair(client)
    form = {"annotator": "ada", "pair": key, "choice": "1"}
    assert client.post("http://127.0.0.1:8000/wrong/vote", data=form).status_code == 403
    assert not file.exists()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_another_host_name_is_refused_whatever_the_token(client: TestClient, host: str) -> None:
    answer = client.get("judge?annotator=ada", headers={"host": host})
    assert answer.status_code == 400
    assert "Which" not in answer.text
    assert client.get("judge?annotator=ada", headers={"host": "localhost:8000"}).status_code == 200


def test_the_token_alone_leads_to_the_page(new_client: NewClient) -> None:
    answer = new_client().get(f"http://127.0.0.1:8000/{TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{TOKEN}/")


@pytest.mark.parametrize("path", ["", "judge?annotator=ada", "style.css", "keys.js", "nothing", "/elsewhere"])
def test_every_answer_forbids_what_is_not_its_own(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert (headers["referrer-policy"], headers["cache-control"]) == ("no-referrer", "no-store")
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script_of_its_own(client: TestClient) -> None:
    page = client.get("judge?annotator=ada").text
    assert set(re.findall(r'(?:src|href|action)="([^"]*)"', page)) == {
        "data:,",
        "style.css",
        "keys.js",
        "./?who",
        "undo",
        "vote",
    }
    assert not re.search(r"<style|style=| on\w+=|<script>", page)
    assert client.get("keys.js").headers["content-type"].startswith("text/javascript")
    assert "footer.vote" in client.get("style.css").text


HOSTILE = "<script>alert(1)</script>\x1b]0;title\x07 \x1b[31m \u202egnp.exe </div>&amp; 'q' \"d\""


def test_texts_are_escaped_and_their_control_characters_shown(new_client: NewClient) -> None:
    turns = [{"role": "<b>user</b>", "content": HOSTILE}]
    texts = pair(1, sft=HOSTILE, dpo=HOSTILE + "!")
    client = new_client(AnswerPair(key=texts.key, messages=turns, answers=texts.answers))
    page = client.get("judge?annotator=<i>ada").text
    assert "<script>alert" not in page
    assert "<b>user" not in page
    assert "<i>ada" not in page
    assert not set("\x1b\x07\u202e") & set(page)
    shown = html.unescape(page)
    assert (
        shown.count("<script>alert(1)</script>\ufffd]0;title\ufffd \ufffd[31m \ufffdgnp.exe </div>&amp; 'q' \"d\"") == 3
    )


def test_the_page_does_not_say_whose_answers_they_are(client: TestClient) -> None:
    for path in ("", "judge?annotator=ada"):
        page = client.get(path).text
        assert not re.search(r"stage:|\bdpo\b|\bsft\b", page.replace("from sft.", "").replace("from dpo.", ""))


@pytest.mark.parametrize(
    ("form", "status", "words"),
    [
        ({"annotator": "ada", "pair": "0" * 32, "choice": "1"}, 404, "no such pair"),
        ({"annotator": "ada", "pair": "KEY", "choice": "3"}, 400, "A vote is 1, 2 or 0"),
        ({"annotator": "ada", "pair": "KEY"}, 400, "A vote is 1, 2 or 0"),
        ({"annotator": " ", "pair": "KEY", "choice": "1"}, 400, "1 to 40 printable characters"),
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
    assert "Nothing was stored" in answer.text
    assert not file.exists()


def test_a_second_vote_is_refused_and_the_first_stays(client: TestClient, file: Path) -> None:
    form = {"annotator": "ada", "pair": shown_pair(client)}
    client.post("vote", data={**form, "choice": "1"})
    before = file.read_bytes()
    answer = client.post("vote", data={**form, "choice": "2"})
    assert answer.status_code == 409
    assert "Undo that vote first" in answer.text
    assert 'href="judge?annotator=ada"' in answer.text
    assert file.read_bytes() == before
    assert client.post("undo", data={"annotator": "bo"}).status_code == 409


def test_a_full_disk_is_told_and_the_vote_can_be_given_later(
    client: TestClient, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"annotator": "ada", "pair": shown_pair(client), "choice": "1"}

    def full(path: Path, _: Vote) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(ballots_module, "append_vote", full)
        answer = client.post("vote", data=form)
    assert answer.status_code == 507
    assert "No space left on device" in answer.text
    assert "0 of 3 judged" in client.get("judge?annotator=ada").text
    assert client.post("vote", data=form).status_code == 303
    assert len(read_votes(file)) == 1


def test_a_file_that_was_changed_meanwhile_is_not_written_over(client: TestClient, file: Path) -> None:
    client.post("vote", data={"annotator": "ada", "pair": shown_pair(client), "choice": "1"})
    with file.open("a", encoding="utf-8") as stream:
        stream.write("by hand\n")
    before = file.read_bytes()
    answer = client.post("undo", data={"annotator": "ada"})
    assert answer.status_code == 500
    assert "changed by somebody else" in answer.text
    assert file.read_bytes() == before


def test_a_name_from_the_command_line_is_not_asked_for(new_client: NewClient) -> None:
    client = new_client(annotator="Ada L.")
    answer = client.get("")
    assert (answer.status_code, answer.headers["location"]) == (303, "judge?annotator=Ada+L.")
    assert "Your name" in client.get("?who").text
    assert "Your name" in client.get("judge?annotator=").text
    assert client.get("vote").status_code == 405


def test_answers_in_the_order_of_the_page_are_those_of_the_vote(client: TestClient, file: Path) -> None:
    page = client.get("judge?annotator=ada").text
    first, second = re.findall(r'<div class="words">It is \d from (\w+)\.</div>', page)
    client.post("vote", data={"annotator": "ada", "pair": shown_pair(client), "choice": "2"})
    (vote,) = read_votes(file)
    assert (vote.shown_first, vote.preferred) == (f"stage:{first}", f"stage:{second}")
    assert {vote.shown_first, vote.preferred} == {SFT, DPO}


def test_empty_answers_and_calls_of_tools_are_shown(new_client: NewClient) -> None:
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": "4"},
    ]
    client = new_client(AnswerPair(key="0" * 32, messages=turns, answers={SFT: " ", DPO: "Four."}))
    page = html.unescape(client.get("judge?annotator=ada").text)
    assert "The answer is empty." in page
    assert '"name": "add"' in page
