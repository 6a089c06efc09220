"""Greedy answers in float32 are the same whatever gives them: this package, transformers, its server, or vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.launch import Engine, SamplingConfig
from alignment.engines.completions import Asked, Generation
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import VllmOptions
from tests.engines.greedy import GAP, PROMPTS, SHARE, TOKENS, differences, report, stop_ids
from tests.transformers_server import missing, model_served

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("vllm_python")]
Smollm = tuple[Any, Any]
Ids = list[int]
BATCH = 20


def _of_generate(model: Any, prompts: list[Ids], stops: Ids) -> list[Ids]:
    """Answers of ``model.generate`` to one left-padded batch, up to and with the token that ends them."""
    longest = max(map(len, prompts))
    rows = model.generate(
        input_ids=torch.tensor([[stops[0]] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    answers: list[Ids] = rows[:, longest:].tolist()
    ends = [[at for at, token in enumerate(answer) if token in stops] for answer in answers]
    return [answer[: end[0] + 1] if end else answer for answer, end in zip(answers, ends, strict=True)]


def _agree(engine: str, smollm: Smollm, prompts: list[Ids], ours: list[Ids], of_engine: list[Ids]) -> None:
    differing = differences(*smollm, prompts, ours, of_engine)
    report(engine, differing, asked=len(prompts))
    assert len(differing) <= (1 - SHARE) * len(prompts)
    assert all(difference.gap < GAP and difference.others < GAP for difference in differing), (
        "a difference that rounding does not explain"
    )


def test_ours_are_those_of_transformers(smollm: Smollm, prompts: list[Ids], ours: list[Ids]) -> None:
    model, tokenizer = smollm
    batches = [prompts[first : first + BATCH] for first in range(0, PROMPTS, BATCH)]
    answers = [answer for batch in batches for answer in _of_generate(model, batch, stop_ids(tokenizer))]
    _agree("transformers", smollm, prompts, ours, answers)


@pytest.fixture(scope="module")
def vllm(
    tmp_path_factory: pytest.TempPathFactory, vllm_python: Path, smollm: Smollm, prompts: list[Ids]
) -> Iterator[EngineSession]:
    model, _ = smollm
    config = SamplingConfig(engine=Engine.vllm, python=str(vllm_python), concurrency=PROMPTS)
    options = VllmOptions(
        model=Path(model.config._name_or_path), dtype="float32", max_length=max(map(len, prompts)) + TOKENS
    )
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with EngineSession(config, where="sampling", log=log, waiting=lambda: None) as session:
        session.start(options)
        yield session


def test_ours_are_those_of_vllm(vllm: EngineSession, smollm: Smollm, prompts: list[Ids], ours: list[Ids]) -> None:
    answers = _asked(vllm, smollm, prompts, temperature=0.0)
    _agree("vLLM", smollm, prompts, ours, answers)


def test_more_prompts_than_vllm_reads_at_once_are_answered_by_their_seeds(
    vllm: EngineSession, smollm: Smollm, prompts: list[Ids]
) -> None:
    """One of its steps takes 2,048 tokens. If it read a part of a prompt there, it would end."""
    assert sum(map(len, prompts)) > 2 * 2048
    answers = _asked(vllm, smollm, prompts, temperature=1.0)
    assert len(set(map(tuple, answers))) > 0.9 * PROMPTS


def _asked(vllm: EngineSession, smollm: Smollm, prompts: list[Ids], *, temperature: float) -> list[Ids]:
    generation = Generation(max_new_tokens=TOKENS, temperature=temperature, end_ids=stop_ids(smollm[1]))
    asked = [Asked(prompt=prompt, answers=1, seed=number) for number, prompt in enumerate(prompts)]
    return [reply.ids for (reply,) in vllm.answers(Weights(), asked, generation)]


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_ours_are_those_of_transformers_serve(
    tmp_path: Path, smollm: Smollm, prompts: list[Ids], ours: list[Ids]
) -> None:
    """The server takes and gives text, one answer at a time; so it is asked a part of the prompts."""
    from openai import OpenAI

    _, tokenizer = smollm
    prompts, ours = prompts[:BATCH], ours[:BATCH]
    questions = [tokenizer.decode(prompt) for prompt in prompts]
    assert tokenizer(questions)["input_ids"] == prompts, "the server reads the prompts as they are meant"
    with model_served(tmp_path, dtype="float32") as (url, name):
        client = OpenAI(base_url=url, api_key="-", timeout=600)
        texts = [
            client.completions.create(model=name, prompt=question, max_tokens=TOKENS, temperature=0).choices[0].text
            for question in questions
        ]
    own_texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ours]
    assert all(own_texts), "an empty text would say nothing"
    served = [
        own if text == own_text else [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for text, own, own_text in zip(texts, ours, own_texts, strict=True)
    ]
    _agree("transformers serve", smollm, prompts, ours, served)
