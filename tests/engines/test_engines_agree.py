"""Greedy answers in float32 are the same whatever gives them: this package, transformers, its server, or vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.sampling_engine import Engine, SamplingConfig
from alignment.engines.completions import Asked, Generation
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.vllm_server import VllmOptions
from tests.engines.greedy import GAP, PROMPTS, SHARE, TOKENS, differences, report, stop_ids
from tests.transformers_server import missing, model_served

pytestmark = pytest.mark.engines
Smollm = tuple[Any, Any]
Ids = list[int]


@pytest.fixture(scope="module")
def plain(smollm: Smollm, prompts: list[Ids]) -> list[Ids]:
    """Answers of ``model.generate`` to one prompt at a time, up to and with the token that ends them."""
    model, tokenizer = smollm
    stops = stop_ids(tokenizer)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        answers.append(row[0, len(prompt) :].tolist())
    return answers


def _agree(engine: str, smollm: Smollm, prompts: list[Ids], ours: list[Ids], theirs: list[Ids]) -> None:
    found = differences(*smollm, prompts, ours, theirs)
    report(engine, found)
    assert len(found) <= (1 - SHARE) * PROMPTS
    assert all(one.gap < GAP and one.others < GAP for one in found), "a difference that rounding does not explain"


def test_ours_are_those_of_transformers(smollm: Smollm, prompts: list[Ids], ours: list[Ids], plain: list[Ids]) -> None:
    _agree("transformers", smollm, prompts, ours, plain)


def test_ours_are_those_of_vllm(
    tmp_path: Path, vllm_python: Path, smollm: Smollm, prompts: list[Ids], ours: list[Ids]
) -> None:
    model, tokenizer = smollm
    config = SamplingConfig(engine=Engine.vllm, python=str(vllm_python))
    options = VllmOptions(
        model=Path(model.config._name_or_path), dtype="float32", max_length=max(map(len, prompts)) + TOKENS
    )
    generation = Generation(max_new_tokens=TOKENS, temperature=0.0, end_ids=stop_ids(tokenizer))
    asked = [Asked(prompt=prompt, answers=1, seed=0) for prompt in prompts]
    with EngineSession(config, where="sampling", log=tmp_path / "vllm.log", waiting=lambda: None) as session:
        session.start(options)
        answers = session.answers(Weights(), asked, generation)
    _agree("vLLM", smollm, prompts, ours, [reply.ids for (reply,) in answers])


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_ours_are_those_of_transformers_serve(
    tmp_path: Path, smollm: Smollm, prompts: list[Ids], ours: list[Ids], plain: list[Ids]
) -> None:
    """The server takes and gives text: equal tokens give equal text, so a different text is looked up in ``plain``,
    which is the same computation."""
    from openai import OpenAI

    _, tokenizer = smollm
    questions = [tokenizer.decode(prompt) for prompt in prompts]
    assert tokenizer(questions)["input_ids"] == prompts, "the server reads the prompts as they are meant"
    with model_served(tmp_path, dtype="float32") as (url, name):
        client = OpenAI(base_url=url, api_key="-", timeout=600)
        texts = [
            client.completions.create(model=name, prompt=question, max_tokens=TOKENS, temperature=0).choices[0].text
            for question in questions
        ]
    served = [
        own if text == _text(tokenizer, own) else other for text, own, other in zip(texts, ours, plain, strict=True)
    ]
    assert [_text(tokenizer, answer) for answer in served] == texts
    _agree("transformers serve", smollm, prompts, ours, served)


def _text(tokenizer: Any, answer: Ids) -> str:
    return str(tokenizer.decode(answer, skip_special_tokens=True))
