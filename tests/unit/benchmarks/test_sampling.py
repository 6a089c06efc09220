"""What is sampled, how it is counted, and what an engine is asked; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.engines.completions import Asked, EngineAnswer, Generation
from benchmarks.contestants import sampling
from benchmarks.contestants.generate_sampling import _by_generate, common_length, in_batches
from benchmarks.contestants.our_sampling import one_batch
from benchmarks.contestants.sampling import Answer, measured
from benchmarks.contestants.vllm_sampling import _asking
from benchmarks.prepare import _select, system_text
from benchmarks.setting import read_json
from benchmarks.works import SamplingSize
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer


def test_a_beginning_that_generate_reads_once_and_a_static_cache_change_no_answer(model: Any) -> None:
    whole, shared = (_by_generate(model, PROMPTS, 2, common=common) for common in (0, 3))
    static = _by_generate(model, PROMPTS, 2, common=0, cache="static")
    assert whole(7, 12) == shared(7, 12) == static(7, 12)
    assert shared(7, 12) == whole(7, 12), "the beginning that was read is as before"
    assert shared(7, 12) != shared(8, 12)
    for answer in (one_batch(model, PROMPTS, 2), whole):
        assert [0 < len(row) <= 12 for row in answer(0, 12)] == [True] * 3


PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 30], [5, 6, 7, 8, 40, 41, 42]]


@pytest.fixture
def model() -> Any:
    return tiny_model().eval()


def test_batches_answer_each_prompt_once_and_draw_different_numbers() -> None:
    def answer_of(part: list[list[int]]) -> Any:
        return lambda seed, limit: [[*prompt, seed, limit] for prompt in part]

    answers = in_batches(PROMPTS, 2, answer_of)(7, 12)
    assert answers == [[*PROMPTS[0], 7, 12], [*PROMPTS[1], 7, 12], [*PROMPTS[2], 1007, 12]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_answers_are_sampled_in_the_number_format_of_the_task(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[torch.dtype] = []

    def peak(dtype: torch.dtype) -> float:
        formats.append(dtype)
        return 1.0

    def sampler(model: Any, prompts: list[list[int]], end: int) -> Answer:
        formats.append(model.dtype)
        return lambda seed, limit: [[end] for _ in prompts]

    monkeypatch.setattr(sampling, "matmul_peak", peak)
    sampling.sample(_task(tmp_path, dtype), sampler)
    assert formats == [getattr(torch, dtype)] * 2, "that of the peak beside it, and that of the model"
    assert read_json(tmp_path / "result.json")["lengths"] == [[1, 1, 1]]


def _task(folder: Path, dtype: str, **setting: Any) -> dict[str, Any]:
    (folder / "tokens.json").write_text(json.dumps(PROMPTS))
    return {
        "dtype": dtype,
        "setting": setting,
        "size": {"system_tokens": 0, "seeds": [0], "new_tokens": 8},
        "base": str(save_tiny_model(folder / "base")),
        "tokens": str(folder / "tokens.json"),
        "result": str(folder / "result.json"),
    }


def test_answers_are_counted_up_to_their_end_for_each_seed_after_a_warm_up() -> None:
    calls: list[Any] = []

    def answer(seed: int, limit: int) -> list[list[int]]:
        calls.append((seed, limit))
        return [[4, 2, 9], [4, 4, 4, 4]]

    size = {"seeds": [3, 5], "new_tokens": 16}
    seconds, lengths = measured(answer, size, 2, warm_up=4, before_each=lambda: calls.append("forget"))
    assert calls == [(0, 4), "forget", (3, 16), "forget", (5, 16)]
    assert lengths == [[2, 4], [2, 4]]
    assert len(seconds) == 2


def test_an_engine_is_asked_each_prompt_once_with_a_seed_of_its_own() -> None:
    class Client:
        def answers(self, model: str, asked: list[Asked], generation: Generation) -> list[list[EngineAnswer]]:
            assert (model, generation) == ("base", Generation(max_new_tokens=9, temperature=1.0, end_ids=[2]))
            assert [request.answers for request in asked] == [1, 1, 1]
            return [[EngineAnswer(ids=[*request.prompt, request.seed], logprobs=[])] for request in asked]

    answer = _asking(Client(), PROMPTS, 2)  # type: ignore[arg-type]
    assert answer(0, 9) == [[*PROMPTS[0], 0], [*PROMPTS[1], 1], [*PROMPTS[2], 2]]
    assert answer(2, 9) == [[*PROMPTS[0], 6], [*PROMPTS[1], 7], [*PROMPTS[2], 8]]


def test_prompts_with_a_common_beginning_are_the_same_behind_another_system_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.rows.conversations", lambda folder: CONVERSATIONS)
    tokenizer = tiny_tokenizer()
    text = system_text(tokenizer, CONVERSATIONS, 9)
    assert "The keys are with the caretaker. The keys are".startswith(text)
    assert len(tokenizer(text)["input_ids"]) == 9
    plain, led = (_prompt_texts(tmp_path, tokenizer, tokens) for tokens in (0, 9))
    assert len(plain) == 2
    assert led == [prompt.replace("You are tiny.", text) for prompt in plain]


CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "The keys are with the caretaker."},
        ]
    }
    for question in ("Hall?", "Shop?", "Who, say?")
]


def _prompt_texts(folder: Path, tokenizer: Any, system_tokens: int) -> list[str]:
    chosen = _select("sampling", folder, tokenizer, None, 1, SamplingSize(prompts=2, system_tokens=system_tokens))
    ids = read_json(Path(chosen["repetitions"][0]["tokens"]))
    assert chosen["repetitions"][0]["steps"] == [{"prompt_tokens": sum(map(len, ids)) - common_length(ids)}]
    return [tokenizer.decode(prompt) for prompt in ids]
