"""A policy as lm-evaluation-harness asks it: log-likelihoods and greedy answers by the fast forward.

Texts become tokens as in the harness's own class for transformers models (``HFLM``), and are cut to the same window, so
that both give the same figures. What is computed differs: padding is left out, and requests that begin alike, such as
the choices of a question or the examples before many questions, are read once for all of them in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from alignment.core.errors import DataError, NonFiniteError
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import AnswerStream, answer_statistics
from alignment.models.forward.generate import generate
from alignment.models.forward.rows import SHORTEST_SHARED, by_tokens, on_host, sent, stream
from alignment.models.kernels.layout import prepacked
from alignment.stages.benchmark.kind import BenchmarkConfig

_WITHOUT_EFFECT = ("do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks")
"""Keys that are read here, or mean nothing to greedy answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """How a task wants its answers: at most so many tokens, up to one of the texts in ``stops``."""

    max_new_tokens: int
    stops: tuple[str, ...]


def answering(settings: Mapping[str, Any], *, default_tokens: int, where: str) -> Answering:
    """Reads a task's ``generation_kwargs``, as the harness reads them for its own models."""
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


Progress = Callable[[int], None]
"""Called with the number of requests that were answered since the last call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """A request in tokens: the model reads ``read``, and its last states predict ``labels``. Example: context ``[1 5
    6]`` and continuation ``[7 2]`` give ``read [1 5 6 7]``, ``labels [7 2]``."""

    read: tuple[int, ...]
    labels: tuple[int, ...]


class HarnessModel(TemplateLM):
    """A policy behind the harness's interface; ``where`` names the arm in errors."""

    backend = "causal"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: BenchmarkConfig,
        *,
        end_ids: Sequence[int],
        where: str,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = config.max_length or positions_of(model.base_model)
        self._model = model
        self._config = config
        self._end_ids = end_ids
        self._where = where
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context: BOS, or EOS for a tokenizer without BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches, which this stage does not use."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with what the tokenizer puts before a text unless the text begins with it already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the turns of a task: {error}",
                where=self._where,
                remedy="a task's description becomes a system turn; use a template that supports system turns "
                "(model.chat_template), or set apply_chat_template=false",
            ) from error

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability of each request's continuation in nats, and whether it is the greedy one."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each whole text in nats, in windows that do not overlap in what they predict."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scored = iter(self._loglikelihood_tokens([(None, *window) for of_text in windows for window in of_text]))
        return [math.fsum(next(scored)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        spans = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(span) for span in spans]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._scored_text(context, continuation) for _, context, continuation in requests]
        by_text = score(self._model, texts, tokens=self._config.micro_batch_tokens, progress=self._progress)
        scored = [by_text[text] for text in texts]
        if not all(math.isfinite(logprob) for logprob, _ in scored):
            raise NonFiniteError(
                f"{self._where} gives log-probabilities that are not finite",
                remedy="its training went wrong: lower its learning rate, or leave out the arm",
            )
        return scored

    def _scored_text(self, context: list[int], continuation: list[int]) -> ScoredText:
        """The request within the window; a context that does not fit loses its beginning."""
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"a task asks for the log-likelihood of a text of {len(continuation)} tokens; the model reads from "
                f"1 to {self.max_length}",
                where=self._where,
                remedy="correct the task's rows, or raise max_length",
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        return ScoredText(read=tuple(ids[:-1]), labels=tuple(continuation))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[Answering, list[int]] = {}
        for index, request in enumerate(requests):
            how = answering(request.args[1], default_tokens=self._config.max_new_tokens, where=self._where)
            groups.setdefault(how, []).append(index)
        answers = [""] * len(requests)
        for how, indices in groups.items():
            texts = self._answers([requests[index].args[0] for index in indices], how)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def _answers(self, prompts: Sequence[str], how: Answering) -> list[str]:
        room = self.max_length - how.max_new_tokens
        if room <= 0:
            raise DataError(
                f"answers of {how.max_new_tokens} tokens leave no room for a prompt in max_length, "
                f"{self.max_length} tokens",
                where=self._where,
                remedy="lower max_new_tokens, or max_gen_toks in the task's generation_kwargs",
            )
        stops = StopTexts(self.tokenizer, how.stops)
        done = 0

        def progress(number: int) -> None:
            nonlocal done
            self._progress(number - done)
            done = number

        answers = generate(
            self._model,
            [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts],
            max_new_tokens=how.max_new_tokens,
            end_ids=self._end_ids,
            batch_size=self._config.batch_size,
            progress=progress,
            ends=stops.ends if how.stops else None,
        )
        return [stops.text(ids) for ids in answers]


@torch.no_grad()
def score(
    model: PreTrainedModel, texts: Sequence[ScoredText], *, tokens: int, progress: Progress
) -> dict[ScoredText, tuple[float, bool]]:
    """Of each text: Σ log p(label | tokens before it) in nats, and whether every label is the most likely token. About
    ``tokens`` tokens are read at once. Texts that are read alike, such as choices of one token, are read once."""
    labels_of: dict[tuple[int, ...], list[ScoredText]] = {}
    counts: dict[ScoredText, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
        if counts[text] == 1:
            labels_of.setdefault(text.read, []).append(text)
    reads = sorted(labels_of)  # those that begin alike are adjacent
    scores: dict[ScoredText, tuple[float, bool]] = {}
    with prepacked(model.base_model, tokens):
        for span in by_tokens([len(read) for read in reads], tokens, behind=_not_shared(reads)):
            batch = reads[span.start : span.stop]
            in_batch = [text for read in batch for text in labels_of[read]]
            scores |= dict(zip(in_batch, _scores(model, batch, in_batch), strict=True))
            progress(sum(counts[text] for text in in_batch))
    return scores


def _not_shared(reads: Sequence[tuple[int, ...]]) -> list[int]:
    """How many tokens each row adds to a batch that has the row before it."""
    added = [len(read) for read in reads[:1]]
    for before, read in pairwise(reads):
        common = next((at for at, (left, right) in enumerate(zip(before, read, strict=False)) if left != right), None)
        shared = min(len(before), len(read)) if common is None else common
        added.append(len(read) - (shared if shared >= SHORTEST_SHARED else 0))
    return added


def _scores(
    model: PreTrainedModel, reads: Sequence[tuple[int, ...]], texts: Sequence[ScoredText]
) -> list[tuple[float, bool]]:
    rows = stream(reads, model.device)
    row_of = {read: row for row, read in enumerate(reads)}
    (index,) = on_host(rows.index)
    predicting = [index[row_of[text.read], len(text.read) - len(text.labels) : len(text.read)] for text in texts]
    labels = torch.tensor([label for text in texts for label in text.labels])
    lengths = tuple(len(text.labels) for text in texts)
    tensors = sent({"indices": torch.cat(predicting), "labels": labels}, model.device)
    statistics = answer_statistics(model, AnswerStream(rows=rows, lengths=lengths, **tensors))
    sums = [logprobs.sum() for logprobs in statistics.logprobs.split(lengths)]
    hits = [is_top1.all().to(sums[0]) for is_top1 in statistics.is_top1.split(lengths)]
    read = torch.stack([*sums, *hits]).tolist()  # a single wait for the GPU
    return [(total, bool(is_top1)) for total, is_top1 in zip(read[: len(texts)], read[len(texts) :], strict=True)]
