"""Scorers behind HTTP, asked through the real client: batched, retried, kept, and never a score that nobody gave."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.grader import ScorerEndpointConfig, ScorerGraderConfig
from alignment.config.reward_server import ServerApi, ServerConfig
from alignment.core.errors import ConfigError, RewardError
from alignment.evaluation.endpoint_calls import GIVE_UP
from alignment.evaluation.saved_replies import SavedReplies
from alignment.rewards.asking import Asking
from alignment.rewards.scorers import Answers
from alignment.rewards.served import GradeScorer, ServerScorer
from tests.judge_server import Answering, Response, Served, listening, serving
from tests.unit.rewards.conftest import answers_to, prompt

FIELD = "scorers[0]"


def length_scores(body: dict[str, Any], _: int = 0) -> Response:
    """Each answer's number of characters."""
    scores = [{"id": item["id"], "score": len(item["answer"]) / 2} for item in body["items"]]
    return Response(body=json.dumps({"scores": scores}))


def asking(folder: Path, *, rank: int = 0, progress: Callable[[], None] = lambda: None) -> Asking:
    files = folder / "replies"
    replies = SavedReplies(files / f"{rank}.jsonl", sorted(files.glob("*.jsonl")))
    return Asking(replies=replies, where="stages.ppo", progress=progress)


def settings(url: str, **changes: Any) -> ServerConfig:
    defaults = {"base_url": url, "model": "rm", "timeout": 5.0, "retries": 1, "concurrency": 1, "batch_size": 4}
    return ServerConfig(**(defaults | changes))


def answers(texts: Sequence[str], start: int = 0) -> Answers:
    return answers_to([prompt(f"Question {start + n}?", line=start + n + 1) for n in range(len(texts))], texts)


def ask(folder: Path, served: Served, texts: Sequence[str], *, rank: int = 0, **changes: Any) -> list[float]:
    scorer = ServerScorer(settings(served.url, **changes), FIELD, asking(folder, rank=rank))
    values: list[float] = scorer.scores(answers(texts)).tolist()
    return values


def failing(folder: Path, answering: Answering, texts: Sequence[str] = ("a", "b"), **changes: Any) -> RewardError:
    with listening(answering) as served, pytest.raises(RewardError) as caught:
        ask(folder, served, texts, **changes)
    return caught.value


def saved(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "replies").glob("*.jsonl")))


# ---- a server -------------------------------------------------------------------------------------------------------


def test_answers_are_scored_in_batches_at_once_and_in_order(tmp_path: Path) -> None:
    texts = ["x" * (n % 5 + 1) + str(n) for n in range(11)]
    together, most = threading.Barrier(3), []

    def answering(body: dict[str, Any], number: int) -> Response:
        together.wait(10)  # all three calls are under way
        most.append(len(body["items"]))
        return length_scores(body)

    progress: list[int] = []
    with listening(answering) as served:
        scorer = ServerScorer(
            settings(served.url, concurrency=3), FIELD, asking(tmp_path, progress=lambda: progress.append(1))
        )
        scores = scorer.scores(answers(texts))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [len(text) / 2 for text in texts]
    assert sorted(most) == [3, 4, 4]
    assert len(progress) == 3
    assert served.paths == ["/v1/scores"] * 3
    assert {request["model"] for request in served.requests} == {"rm"}


def test_equal_answers_to_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    same, other = prompt("Same?"), prompt("Other?")
    with listening(length_scores) as served:
        scorer = ServerScorer(settings(served.url), FIELD, asking(tmp_path))
        assert scorer.scores(answers_to([same, same, other], ["aa", "aa", "aa"])).tolist() == [1.0] * 3
        scorer.scores(answers_to([other, same], ["aa", "aa"]))
    assert [len(request["items"]) for request in served.requests] == [2]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(tmp_path: Path, status: int) -> None:
    with listening(lambda body, n: Response(status=status, body="{}") if n == 0 else length_scores(body)) as served:
        assert ask(tmp_path, served, ["aa"], retries=2) == [1.0]
    assert len(served.requests) == 2


def test_a_call_that_fails_ends_the_stage_by_name_and_the_other_scores_are_kept(tmp_path: Path) -> None:
    texts, up = [f"text {n}" for n in range(10)], False

    def answering(body: dict[str, Any], _: int) -> Response:
        broken = any(item["answer"] == "text 5" for item in body["items"])
        return Response(status=500, body="{}") if broken and not up else length_scores(body)

    with listening(answering) as served:
        with pytest.raises(RewardError) as caught:
            ask(tmp_path, served, texts)
        assert caught.value.exit_code == 9
        assert caught.value.where == "stages.ppo.scorers[0].server"
        assert f"1 of 3 calls to the reward server at {served.url} failed" in caught.value.message
        assert "InternalServerError" in caught.value.message
        assert "stages.ppo.scorers[0].server.timeout" in caught.value.remedy
        assert len(served.requests) == 4, "a retry of one call, and the others"
        up = True
        assert ask(tmp_path, served, texts, batch_size=16) == [3.0] * 10
    assert [item["answer"] for item in served.requests[-1]["items"]] == texts[4:8], "the failed call's answers alone"


def test_a_server_that_is_down_is_named_after_some_calls(tmp_path: Path) -> None:
    with listening(length_scores) as served:
        url = served.url
    scorer = ServerScorer(settings(url, retries=0, batch_size=1), FIELD, asking(tmp_path))
    with pytest.raises(RewardError, match=rf"{GIVE_UP} of {GIVE_UP} calls.*APIConnectionError"):
        scorer.scores(answers([f"text {n}" for n in range(50)]))
    assert not saved(tmp_path)


def test_a_server_that_never_answers_is_given_up_at_the_timeout(tmp_path: Path) -> None:
    message = failing(tmp_path, lambda *_: None, timeout=0.1, retries=0).message
    assert "timed out" in message.lower()


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("NaN", r"gave nan for an answer to rows\.jsonl:2, which is not finite"),
        ("Infinity", r"gave inf for an answer to rows\.jsonl:2, which is not finite"),
        ("-2e6", r"gave -2000000.0 for an answer to rows\.jsonl:2, which is outside ±1e\+06"),
        ("null", r"gave None \(NoneType\) for an answer to rows\.jsonl:2, which is not a number"),
        ('"3"', r"gave '3' \(str\)"),
    ],
)
def test_what_is_no_score_is_refused_with_its_row_and_kept_nowhere(tmp_path: Path, score: str, words: str) -> None:
    reply = f'{{"scores": [{{"id": 0, "score": 1.0}}, {{"id": 1, "score": {score}}}]}}'
    error = failing(tmp_path, lambda *_: Response(body=reply))
    assert re.match(rf"1 of 1 calls to the reward server at \S+ failed; the last error was: {words}", error.message)
    assert not saved(tmp_path)


def test_true_and_false_are_scores(tmp_path: Path) -> None:
    body = '{"scores": [{"id": 0, "score": true}, {"id": 1, "score": false}]}'
    with listening(lambda *_: Response(body=body)) as served:
        assert ask(tmp_path, served, ["a", "b"]) == [1.0, 0.0]


def test_the_other_calls_are_made_and_kept_beside_one_whose_score_is_refused(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], _: int) -> Response:
        wrong = any(item["answer"] == "wrong" for item in body["items"])
        return Response(body='{"scores": [{"id": 0, "score": null}]}') if wrong else length_scores(body, 0)

    failing(tmp_path, reply, ["wrong", "bb", "ccc"], batch_size=1)
    with listening(length_scores) as served:
        assert ask(tmp_path, served, ["wrong", "bb", "ccc"], batch_size=1) == [2.5, 1.0, 1.5]
    assert [item["answer"] for request in served.requests for item in request["items"]] == ["wrong"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"scores": [{"id": 1, "score": 1.0}, {"id": 0, "score": 2.0}]}', "returns the scores in a different order"),
        ('{"scores": [{"id": 0, "score": 1.0}]}', "returns 1 scores for 2 answers"),
        ("<html>It works!</html>", "calls to the reward server"),
        ("{not json", "calls to the reward server"),
        pytest.param("[" * 100_000 + "]" * 100_000, "its reply is nested too deeply", id="nested deeply"),
        pytest.param(f'{{"scores": {"[" * 900}{"]" * 900}}}', "calls to the reward server", id="nested"),
    ],
)
def test_a_reply_of_another_form_is_a_failure_and_never_a_score(tmp_path: Path, body: str, words: str) -> None:
    assert words in failing(tmp_path, lambda *_: Response(body=body)).message
    assert not saved(tmp_path)


def test_the_key_comes_from_its_variable_and_stands_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_KEY", "sk-canary-123")
    with listening(length_scores) as served:
        ask(tmp_path, served, ["a"], api_key_env="SCORER_KEY")
    assert served.keys == ["Bearer sk-canary-123"]
    assert "canary" not in saved(tmp_path)
    refused = Response(status=401, body=json.dumps({"error": {"message": "wrong key:" + " sk-canary-123" * 40}}))
    message = failing(tmp_path, lambda *_: refused, ["b"], api_key_env="SCORER_KEY").message
    assert "wrong key: ***" in message
    assert "canary" not in message
    quoted = Response(body=json.dumps({"error": "the key is bad:" + " sk-canary-123" * 40}))  # of which a part is shown
    assert "canary" not in failing(tmp_path, lambda *_: quoted, ["b"], api_key_env="SCORER_KEY").message
    monkeypatch.delenv("SCORER_KEY")
    with pytest.raises(ConfigError, match="variable SCORER_KEY is not set") as caught:
        ServerScorer(settings(served.url, api_key_env="SCORER_KEY"), FIELD, asking(tmp_path))
    assert caught.value.where == "stages.ppo.scorers[0].server.api_key_env"


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_what_was_scored_is_asked_again_only_if_what_counts_has_changed(tmp_path: Path) -> None:
    texts = ["a", "bb", "ccc"]
    with listening(length_scores) as first:
        expected = ask(tmp_path, first, texts)
    with listening(lambda body, _: length_scores(body)) as again:
        how = {"batch_size": 1, "concurrency": 7, "timeout": 9.0, "retries": 0}
        assert ask(tmp_path, again, texts, **how) == expected, "another address, and other ways to call it"
        assert not again.requests
        ask(tmp_path, again, texts, model="other")
        assert len(again.requests) == 1
        ask(tmp_path, again, ["a", "bb", "cccc"])
        assert [item["answer"] for item in again.requests[-1]["items"]] == ["cccc"]
        scorer = ServerScorer(settings(again.url), FIELD, asking(tmp_path))
        scorer.scores(answers(["a"], start=100))
        assert again.requests[-1]["items"][0]["messages"][0]["content"] == "Question 100?"


def test_scorers_for_two_labels_of_one_classifier_share_no_score(tmp_path: Path) -> None:
    def classes(body: dict[str, Any], _: int) -> Response:
        data = [{"index": index, "probs": [0.25, 0.75]} for index, _ in enumerate(body["input"])]
        return Response(body=json.dumps({"data": data}))

    shared = asking(tmp_path)
    with listening(classes) as served:
        for label, score in (("0", 0.25), ("1", 0.75)):
            config = settings(served.url, api=ServerApi.vllm_classify, label=label)
            assert ServerScorer(config, f"scorers[{label}]", shared).scores(answers(["a", "b"])).tolist() == [score] * 2


def test_a_line_that_was_cut_off_costs_one_call_and_no_other(tmp_path: Path) -> None:
    texts = ["a", "bb", "ccc"]
    with listening(length_scores) as served:
        expected = ask(tmp_path, served, texts)
        (file,) = (tmp_path / "replies").iterdir()
        whole = file.read_text()
        file.write_text(whole[:-5])
        assert ask(tmp_path, served, texts) == expected
        assert [item["answer"] for item in served.requests[-1]["items"]] == ["ccc"]
        assert ask(tmp_path, served, texts) == expected
    assert len(served.requests) == 2


def test_every_process_writes_a_file_and_reads_all(tmp_path: Path) -> None:
    with listening(length_scores) as served:
        ask(tmp_path, served, ["a", "bb"], rank=1)
        assert ask(tmp_path, served, ["a", "bb", "ccc"]) == [0.5, 1.0, 1.5]
    assert [len(request["items"]) for request in served.requests] == [2, 1]
    assert [file.name for file in sorted((tmp_path / "replies").iterdir())] == ["0.jsonl", "1.jsonl"]


# ---- a grader -------------------------------------------------------------------------------------------------------


def grader(url: str, **changes: Any) -> ScorerGraderConfig:
    endpoint = ScorerEndpointConfig(base_url=url, model="m", timeout=5.0, retries=0, concurrency=2)
    return ScorerGraderConfig(endpoint=endpoint, **changes)


def test_a_grade_is_the_score_and_is_asked_for_with_rubric_and_reference(tmp_path: Path) -> None:
    prompts = [prompt("Who?", line=1, reference="Ada."), prompt("Where?", line=2)]
    progress: list[int] = []
    with serving(lambda text, _: Response(text="Good.\n[[4]]" if "Ada did" in text else "Bad.\n[[1]]")) as served:
        config = grader(served.url, rubric="Be right.", lowest=1, highest=5, show_reference=True)
        scorer = GradeScorer(config, FIELD, asking(tmp_path, progress=lambda: progress.append(1)))
        assert scorer.scores(answers_to(prompts, ["Ada did.", "Here."])).tolist() == [4.0, 1.0]
        texts = sorted(request["messages"][0]["content"] for request in served.requests)
        again = GradeScorer(
            grader("http://127.0.0.1:9/v1", rubric="Be right.", highest=5, show_reference=True), FIELD, asking(tmp_path)
        )
        assert again.scores(answers_to(prompts, ["Ada did.", "Here."])).tolist() == [4.0, 1.0], "at another address"
    assert len(texts) == len(progress) == 2
    assert all("Be right." in text for text in texts)
    assert sum("Ada." in text for text in texts) == 1


def test_a_grader_sees_the_tools_of_a_prompt(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "calendar"}}
    with serving(lambda *_: Response(text="[[4]]")) as served:
        scorer = GradeScorer(grader(served.url), FIELD, asking(tmp_path))
        scorer.scores(answers_to([replace(prompt("When?"), tools=(tool,))], ["On Monday."]))
        (request,) = served.requests
    assert '{"name": "calendar"}' in request["messages"][0]["content"]


def test_a_reply_without_a_grade_ends_the_stage_unless_its_score_is_set(tmp_path: Path) -> None:
    with serving(lambda text, _: Response(text="[[7]]" if "bb" in text else "I like it.")) as served:
        with pytest.raises(RewardError) as caught:
            GradeScorer(grader(served.url), FIELD, asking(tmp_path)).scores(answers(["bb", "a"]))
        assert caught.value.where == "grade by m"
        assert "gave no grade for an answer to rows.jsonl:2; its reply ends with 'I like it.'" in caught.value.message
        assert "stages.ppo.scorers[0].grader.ungraded" in caught.value.remedy
        lenient = GradeScorer(grader(served.url, ungraded=-3.0), FIELD, asking(tmp_path))
        assert lenient.scores(answers(["bb", "a"])).tolist() == [7.0, -3.0]
    assert len(served.requests) == 2, "its reply is kept all the same"


def test_a_failed_call_to_a_grader_is_a_scorers_error(tmp_path: Path) -> None:
    with serving(lambda *_: Response(status=400, body="{}")) as served, pytest.raises(RewardError) as caught:
        GradeScorer(grader(served.url, ungraded=0.0), FIELD, asking(tmp_path)).scores(answers(["a"]))
    assert caught.value.exit_code == 9
    assert f"1 of 1 calls to the grader at {served.url} failed" in caught.value.message
    assert caught.value.where == "stages.ppo.scorers[0].grader.endpoint"
