"""Where a generated answer ends: its greatest length, and the texts that stop it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from alignment.core.errors import DataError

_WITHOUT_EFFECT = ("do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks")
"""Keys that are read here, or mean nothing to greedy answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """How a task wants its answers: at most so many tokens, up to one of the texts in ``stops``."""

    max_new_tokens: int
    stops: tuple[str, ...]


def answering(settings: Mapping[str, Any], *, default_tokens: int, where: str) -> Answering:
    """Reads a task's ``generation_kwargs``, as the harness reads them for its own models.

    Raises:
        DataError: the task does not want the greedy answer.
    """
    normal = normalize_gen_kwargs(dict(settings), default_tokens)
    if normal.get("do_sample") and normal.get("temperature", 0.0) > 0.0:
        raise DataError(
            "a task samples its answers, but this stage decodes greedily",
            where=where,
            remedy="set do_sample: false in the task's generation_kwargs",
        )
    if others := [key for key in normal if key not in _WITHOUT_EFFECT]:
        raise DataError(
            f"a task sets {', '.join(others)} in its generation_kwargs, which this stage does not support",
            where=where,
            remedy="remove it; only until and max_gen_toks are supported, with greedy decoding",
        )
    stops = handle_stop_sequences(normal.get("until"), eos=None)
    return Answering(max_new_tokens=normal["max_gen_toks"], stops=tuple(stop for stop in stops if stop))


class StopTexts:
    """Texts that stop an answer, however its tokens cut them."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        # A token is at least a byte; more tokens are decoded because some stand for parts of a character.
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 4

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether the newest token of the answer completes a stop text, which may be a control token's."""
        text = self._tokenizer.decode(list(answer[-self._tail :]), skip_special_tokens=False)
        return any(stop in text for stop in self._stops)

    def text(self, answer: Sequence[int]) -> str:
        """The answer before its first stop text, without control tokens."""
        text: str = self._tokenizer.decode(list(answer), skip_special_tokens=True)
        return text[: min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))]
