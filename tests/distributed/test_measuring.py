"""Stages that sample or measure make the same bytes on one process and on several, also if they are killed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.config.evaluating import JudgeConfig, JudgeKind
from alignment.config.scoring import MetricConfig
from alignment.job import StageSpec
from alignment.records.worker import Status
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs
from tests.generating import sample_spec, sampled
from tests.judge_server import Response, Served, serving
from tests.measuring import SAMPLED, Measuring, files


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Measuring:
    return Measuring(tmp_path_factory.mktemp("measuring"))


def made(spec: StageSpec, *, world_size: int) -> dict[str, bytes]:
    assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
    return files(spec.artifact)


def test_greedy_answers_of_several_turns_and_their_figures(measuring: Measuring) -> None:
    """Seven rows, three of them with two turns, in parts of four answers: neither divides by the processes."""
    alone = made(measuring.evaluate("greedy", 7), world_size=1)
    assert {"evaluation.json", "samples.jsonl"} <= set(alone)
    assert made(measuring.evaluate("greedy-2", 7), world_size=2) == alone
    assert made(measuring.evaluate("greedy-3", 7), world_size=3) == alone


def test_sampled_answers_are_those_of_one_process_prompt_by_prompt(measuring: Measuring) -> None:
    alone = made(measuring.evaluate("sampled", 4, answers=SAMPLED), world_size=1)
    assert made(measuring.evaluate("sampled-2", 4, answers=SAMPLED), world_size=2) == alone


def test_a_single_answer_leaves_a_process_nothing_to_do(measuring: Measuring) -> None:
    alone = made(measuring.evaluate("single", 1, arms=["base"]), world_size=1)
    assert made(measuring.evaluate("single-2", 1, arms=["base"]), world_size=2) == alone


def test_choices_of_policies(measuring: Measuring) -> None:
    assert made(measuring.choices("choices-2"), world_size=2) == made(measuring.choices("choices"), world_size=1)


def test_what_was_forgotten(measuring: Measuring) -> None:
    alone = made(measuring.forgetting("forgetting", 9), world_size=1)
    assert {"forgetting.json", "texts.jsonl", "questions.jsonl"} <= set(alone)
    assert made(measuring.forgetting("forgetting-2", 9), world_size=2) == alone


@pytest.mark.parametrize("pairs", [5, 70], ids=["fewer parts than processes", "two parts"])
def test_a_reward_card(measuring: Measuring, pairs: int) -> None:
    alone = made(measuring.reward_card(f"card-{pairs}", pairs), world_size=1)
    assert {"card.json", "pairs.jsonl"} <= set(alone)
    assert made(measuring.reward_card(f"card-{pairs}-2", pairs), world_size=2) == alone


def test_answers_survive_a_kill_and_another_number_of_processes_goes_on(measuring: Measuring) -> None:
    """An arm answers thirteen first turns in four parts; each of two processes makes one before both are killed."""
    alone = made(measuring.evaluate("straight", 13), world_size=1)
    spec = measuring.evaluate("killed", 13)
    assert on_processes(spec, kill_after=2, killed_when="answering") == [-9, -9]
    parts = sorted((spec.work / "checkpoints").glob("part-answers-*.json"))
    assert len(parts) == 2
    before = {part: part.stat().st_mtime_ns for part in parts}
    assert on_processes(spec, world_size=1, kill_after=3, killed_when="answering") == [-9]
    assert len(list(parts[0].parent.glob("part-answers-*.json"))) == 4, "it made the two that were missing"
    assert {part: part.stat().st_mtime_ns for part in parts} == before
    assert on_processes(spec, world_size=3) == [0, 0, 0], logs(spec)
    assert files(spec.artifact) == alone


def test_cached_answers_are_made_by_no_process(measuring: Measuring) -> None:
    spec = measuring.evaluate("cached", 3)
    expected = made(spec, world_size=2)
    shutil.rmtree(spec.artifact)
    assert on_processes(spec, kill_after=1, killed_when="answering") == [0, 0], logs(spec)
    assert files(spec.artifact) == expected


def test_a_function_that_raises_ends_all_processes_and_the_first_is_named(measuring: Measuring, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def score(prompts, completions, rows):\n    raise ValueError('not today')\n")
    metric = MetricConfig(name="raising", source=f"{tmp_path}/score.py:score")
    spec = measuring.evaluate("raising", 3, metrics=[metric])
    assert on_processes(spec) == [9, 9], logs(spec)
    status = Status.read(spec.run_folder)
    assert status is not None
    assert status.where == "stage evaluate, process 0 of 2"
    assert "raised ValueError: not today" in status.error


def test_a_policy_that_a_process_cannot_ask_ends_all_of_them(measuring: Measuring) -> None:
    spec = measuring.evaluate("too-long", 3, max_new_tokens=5000)
    codes = on_processes(spec)
    assert codes[0] == codes[1] != 0, logs(spec)
    status = Status.read(spec.run_folder)
    assert status is not None
    assert "the longest prompt with its answer needs" in status.error


def test_a_judge_is_asked_by_the_first_process_alone(measuring: Measuring) -> None:
    def judge(prompt: str, _: int) -> Response:
        return Response(text="[[A]]" if len(prompt) % 3 else "[[tie]]")

    def judged(name: str, world_size: int) -> tuple[dict[str, bytes], Counter[str]]:
        with serving(judge) as served:
            config = JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config())
            result = made(measuring.evaluate(name, 3, judge=config), world_size=world_size)
            return result, asked(served)

    alone, questions = judged("judged", 1)
    assert judged("judged-2", 2) == (alone, questions)
    assert set(questions.values()) == {1}


def asked(served: Served) -> Counter[str]:
    prompts: list[Any] = [request["messages"][0]["content"] for request in served.requests]
    return Counter(prompts)


FILES = ("rows.jsonl", "samples.jsonl", "sampling.json")


def sampling(folder: Path) -> StageSpec:
    """Five parts, so that one of two processes has a part more."""
    return sample_spec(folder, batch_size=8)


def content(artifact: Path) -> dict[str, bytes]:
    return {name: (artifact / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(sampled(tmp_path_factory.mktemp("alone"), batch_size=8))


def test_two_processes_sample_what_one_samples(tmp_path: Path, alone: dict[str, bytes]) -> None:
    spec = sampling(tmp_path)
    assert on_processes(spec) == [0, 0], logs(spec)
    assert content(spec.artifact) == alone


def test_processes_that_are_killed_leave_parts_from_which_one_process_continues(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    spec = sampling(tmp_path)
    assert on_processes(spec, kill_after=2, killed_when="sampling") == [-9, -9]
    parts = sorted(part.name for part in (spec.work / "checkpoints").glob("part-*.json"))
    assert [part.partition("-")[2].rpartition("-")[0] for part in parts] == ["answering-0", "answering-1"]
    assert on_processes(spec, world_size=1) == [0], logs(spec)
    assert content(spec.artifact) == alone
