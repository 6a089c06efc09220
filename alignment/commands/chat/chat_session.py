"""A policy that takes part in a conversation: its own history, its chat template, answers that come token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.config.model import Dtype
from alignment.core.artifacts import verify
from alignment.core.errors import DataError
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, saved_adapters
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.training.device import own_device

HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How to answer. ``temperature`` 0 takes the likeliest token; else ``seed`` and the answer's number give the draws.

    ``max_new_tokens`` bounds an answer.
    """

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(kw_only=True)
class Voice:
    """A loaded policy called ``name``, and what was said in its hearing."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    manner: Manner
    history: list[Message] = field(default_factory=list)
    answers: int = 0

    def __post_init__(self) -> None:
        """Refuses at once what no answer could be had with.

        Raises:
            DataError: there is no chat template, or one that does not take a system message that is given.
        """
        self.ends = end_ids(self.tokenizer)
        self._rendered([Message(role="user", content="Hi.")])

    def forget(self) -> None:
        """Begins a new conversation."""
        self.history.clear()

    def answer(self, words: str, *, on_text: Callable[[str], None], note: Callable[[str], None]) -> None:
        """Says something and hears the answer: ``on_text`` gets pieces of it as they come.

        A KeyboardInterrupt ends the answer where it is. ``note`` is told of turns that were dropped because the
        conversation became too long for the model.

        Raises:
            DataError: the template refuses these words, or they are too long by themselves; nothing was said then.
        """
        asked = Message(role="user", content=words)
        prompt = self._fitting(asked, note)
        room = self._positions() - len(prompt)
        said = _Text(self.tokenizer, on_text)
        try:
            generate(
                self.model,
                [prompt],
                max_new_tokens=min(self.manner.max_new_tokens, room),
                end_ids=sorted(self.ends),
                batch_size=1,
                sampling=self._sampling(),
                on_token=lambda _, token: said.add(token),
            )
            said.finish()
        finally:
            self.answers += 1
            if said.text:
                self.history += [asked, Message(role="assistant", content=said.text)]

    def _fitting(self, asked: Message, note: Callable[[str], None]) -> list[int]:
        """The prompt's tokens; the oldest exchanges are dropped until an answer fits behind it."""
        dropped, left = 0, list(self.history)
        positions = self._positions()
        prompt = self._rendered([*left, asked])
        while left and len(prompt) + self.manner.max_new_tokens > positions:
            left, dropped = left[2:], dropped + 1
            prompt = self._rendered([*left, asked])
        if len(prompt) >= positions:
            raise DataError(
                f"that is {len(prompt)} tokens; {self.name} reads {positions}, its answer included", remedy="say less"
            )
        if dropped:
            self.history = left
            turns = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            note(f"{self.name}: the oldest {turns} dropped, since the model reads {positions} tokens at most")
        return prompt

    def _rendered(self, turns: list[Message]) -> list[int]:
        system = [Message(role="system", content=self.manner.system)] if self.manner.system else []
        return prompt_ids(self.tokenizer, [*system, *turns])

    def _positions(self) -> int:
        """How many tokens it can read and write."""
        return positions_of(unwrapped(self.model).base_model)

    def _sampling(self) -> Sampling | None:
        if self.manner.temperature == 0:
            return None
        rng = torch.Generator().manual_seed((self.manner.seed << 20) + self.answers)
        uniforms = torch.rand(1, self.manner.max_new_tokens, dtype=torch.float64, generator=rng)
        return Sampling(temperature=self.manner.temperature, uniforms=uniforms)


class _Text:
    """Tokens as text, handed on in pieces of whole characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []

    def add(self, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        self._hand_on(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip().rstrip(HALF_A_CHARACTER))

    def finish(self) -> None:
        """There are no more: what looked like half a character is one that the model said."""
        self._hand_on(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip())

    def _hand_on(self, whole: str) -> None:
        new = whole[len(self.text) :]
        self.text = whole if len(whole) > len(self.text) else self.text
        if new:
            self._on_text(new)


def load_voice(
    name: str, artifact: Path | None, base: Path | None, dtype: Dtype, *, manner: Manner, chat_template: str | None
) -> Voice:
    """A stage's result on its base (None where it holds its own), or the bare ``base``.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        ModelError: a model cannot be loaded.
        DataError: see ``Voice``.
    """
    if artifact is None:
        assert base is not None, "there is nothing else to load"
        found = Lineage(source="base", base=base, adapters=())
        tokenizer = load_tokenizer(base, chat_template)
    else:
        manifest = verify(artifact, content=True)
        found = Lineage(
            source=manifest.base["source"],
            base=base or artifact / "model",
            adapters=saved_adapters(artifact, manifest),
        )
        tokenizer = load_tokenizer(artifact / "tokenizer", model=found.base)
    model = load_policy(found, DTYPES[dtype]).to(own_device())
    use_flat_attention(model)  # as an evaluation has it
    return Voice(name=name, model=model, tokenizer=tokenizer, manner=manner)
