"""A PPO stage whose answers a server or a function scores: killed, on several processes, and with one that fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.scoring import GuardConfig, ScorerConfig, ServerConfig
from alignment.job import StageSpec
from alignment.records.worker import Heartbeat, Status
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.shared.answer_sampling import REPLIES
from tests.chained import LORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs
from tests.judge_server import Response, Served, listening

Reply = Callable[[dict[str, Any], int], Response | None]


def stage(folder: Path, url: str, **changes: Any) -> StageSpec:
    """Two updates of eight answers, scored by a server in calls of two answers, and watched by another scorer of it."""
    chained = Chained(folder)
    settings: dict[str, Any] = {"base_url": url, "model": "rm", "timeout": 20.0, "retries": 0, "concurrency": 2}
    server = ServerConfig(**(settings | {"batch_size": 2} | changes))
    config = config_of(
        "ppo",
        LORA,
        reward=None,
        scorers=[ScorerConfig(source="server", server=server, normalize=True)],
        guard=GuardConfig(
            every=1, prompts=4, scorer=ScorerConfig(source="server", server=replace(server, model="other"))
        ),
    )
    assert isinstance(config, PpoConfig)
    return chained.spec("ppo", LORA, config=config)


def score(item: dict[str, Any]) -> float:
    return sum(map(ord, item["answer"])) % 101 / 10


def scores(body: dict[str, Any], _: int = 0) -> Response:
    return Response(body=json.dumps({"scores": [{"id": item["id"], "score": score(item)} for item in body["items"]]}))


def question(model: str, item: dict[str, Any]) -> str:
    return json.dumps([model, item["messages"], item["answer"]])


def asked(served: Served) -> Counter[str]:
    return Counter(question(request["model"], item) for request in served.requests for item in request["items"])


def content(artifact: Path) -> dict[str, bytes]:
    files = sorted(path for path in artifact.rglob("*") if path.suffix == ".safetensors" or path.name == "guard.jsonl")
    return {str(path.relative_to(artifact)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Counter[str]]:
    with listening(scores) as served:
        spec = stage(tmp_path_factory.mktemp("undisturbed"), served.url)
        assert on_processes(spec, world_size=1) == [0], logs(spec)
        return content(spec.artifact), asked(served)


def killing(spec_of: Callable[[], StageSpec], call: int) -> Reply:
    """Scores until a call, and kills the stage once it has saved these scores; that call and all later ones wait."""
    scored: list[int] = []

    def are_saved() -> bool:
        texts = [path.read_text() for path in (spec_of().work / REPLIES).glob("*.jsonl")]
        return len(scored) == call and sum(text.count('"key"') for text in texts) >= sum(scored)

    def reply(body: dict[str, Any], number: int) -> Response | None:
        if number < call:
            scored.append(len(body["items"]))
            return scores(body)
        if number == call:
            deadline = time.monotonic() + 10  # the client gives up after 20
            while not are_saved() and time.monotonic() < deadline:
                time.sleep(0.01)
            for heartbeat in Heartbeat.read_all(spec_of().work).values():
                with suppress(ProcessLookupError):
                    os.kill(heartbeat.pid, signal.SIGKILL)
        return None

    return reply


@pytest.mark.parametrize("call", [3, 9])
def test_a_stage_that_is_killed_in_a_batch_asks_nothing_twice_and_ends_alike(
    tmp_path: Path, undisturbed: tuple[dict[str, bytes], Counter[str]], call: int
) -> None:
    expected, questions = undisturbed
    specs: list[StageSpec] = []
    with listening(killing(lambda: specs[0], call)) as first:
        specs.append(stage(tmp_path, first.url))
        assert on_processes(specs[0], world_size=1) == [-9]
    answered = asked(Served(url=first.url, requests=first.requests[:call]))
    assert answered, "it was killed after some replies"
    with listening(scores) as second:
        spec = stage(tmp_path, second.url)  # at another address
        assert on_processes(spec, world_size=1) == [0], logs(spec)
    assert answered + asked(second) == questions, "no answer is scored twice, and none is left out"
    assert content(spec.artifact) == expected


def test_two_processes_ask_each_their_share_and_the_main_one_for_the_guard(
    tmp_path: Path, undisturbed: tuple[dict[str, bytes], Counter[str]]
) -> None:
    _, questions = undisturbed
    with listening(scores) as served:
        spec = stage(tmp_path, served.url)
        assert on_processes(spec) == [0, 0], logs(spec)
    assert sum(asked(served).values()) == sum(questions.values())
    assert max(asked(served).values()) == max(questions.values()) == 1


def test_a_call_that_fails_on_one_process_ends_both_and_none_waits(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Response:
        return Response(status=500, body="{}") if number == 6 else scores(body)

    with listening(reply) as served:
        spec = stage(tmp_path, served.url)
        assert on_processes(spec) == [9, 9], logs(spec)
        status = json.loads((spec.run_folder / "status.json").read_text())
        assert f"calls to the reward server at {served.url} failed" in status["error"]
        assert status["exit_code"] == 9
    failed = asked(served)
    with listening(scores) as again:
        spec = stage(tmp_path, again.url)
        (spec.run_folder / "status.json").unlink()
        assert on_processes(spec) == [0, 0], logs(spec)
    assert len(asked(again) & failed) <= 2, "only the answers of the call that failed"


SCORER = """\
import os, time
from alignment import worker

def score(prompts, completions, rows):
    if os.environ["RANK"] == "0":
        return [0.5 for _ in completions]
    report = worker._finish
    worker._finish = lambda *values, **named: (time.sleep(3), report(*values, **named))
    raise ValueError("not today")
"""


def test_the_process_that_raised_is_named_by_the_other_one_too(tmp_path: Path) -> None:
    """The other process reports first, because the one that raises sleeps before it reports."""
    file = tmp_path / "scorer.py"
    file.write_text(SCORER)
    config = config_of("ppo", LORA, reward=None, scorers=[ScorerConfig(source=f"{file}:score")])
    spec = Chained(tmp_path).spec("ppo", LORA, config=config)
    assert on_processes(spec) == [9, 9], logs(spec)
    status = Status.read(spec.run_folder)
    assert status is not None
    assert status.where == "stage ppo, process 1 of 2"
    assert "raised ValueError: not today" in status.error
