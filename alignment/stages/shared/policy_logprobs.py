"""Log-probabilities of rows under several policies, which the processes of a stage compute together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from alignment.evaluation.arms import TOKENS, sequence_logprobs
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import micro_batches_of
from alignment.models.kernels.layout import prepacked
from alignment.stages.shared.policies import Policies
from alignment.training.context import StageContext
from alignment.training.sharding import own_of_all, shared

T = TypeVar("T")
V = TypeVar("V")


def in_shares(context: StageContext, items: Sequence[T], values_of: Callable[[Sequence[T]], list[V]]) -> list[V]:
    """The values of all items, in order, on every process; every process must call this. ``values_of`` gives the values
    of some consecutive items, as many of each as there are. It is called once on each process whose share has items.
    The value of an item must not depend on the other items, so that it does not depend on the number of processes. If
    it fails on one process, all raise its error."""
    first, end = (len(items) * number // context.world_size for number in (context.rank, context.rank + 1))
    share = items[first:end]
    return [value for values in shared(lambda: values_of(share) if share else []) for value in values]


def on_main(context: StageContext, make: Callable[[], T]) -> T | None:
    """What the main process makes; None on the others, which wait for it. Every process must call this. If it fails,
    all raise its error."""
    return own_of_all(lambda: make() if context.is_main else None)


def from_main(context: StageContext, make: Callable[[], T]) -> T:
    """What the main process makes, on every process; otherwise like ``on_main``."""
    return shared(lambda: [make()] if context.is_main else [])[0][0]


K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRows:
    """Rows of token ids that a policy reads: a prompt and the answer whose log-probability is asked for."""

    policy: Lineage
    prompts: Sequence[list[int]]
    answers: Sequence[list[int]]

    def micro_batches(self) -> list[range]:
        """The rows that are computed at once, whichever process computes them."""
        return micro_batches_of(zip(self.prompts, self.answers, strict=True), tokens=TOKENS)


def policy_logprobs(
    context: StageContext, phase: str, policies: Policies, asked: Mapping[K, PolicyRows]
) -> dict[K, list[float]]:
    """Sum of log p(token | prefix) over each answer, in nats, on every process; every process must call this. The
    processes divide the micro-batches. A process loads the policies of its own, one at a time. Progress is reported as
    ``phase``."""
    spans = [(key, span) for key, rows in asked.items() for span in rows.micro_batches()]

    def logprobs_of(share: Sequence[tuple[K, range]]) -> list[list[float]]:
        values: list[list[float]] = []
        for key, of_key in groupby(share, key=lambda item: item[0]):
            context.progress(phase, len(values), len(share))
            rows = asked[key]
            model = policies.load(rows.policy)
            with prepacked(model.base_model, TOKENS):  # once for all micro-batches
                for _, span in of_key:
                    some = slice(span.start, span.stop)
                    values.append(sequence_logprobs(model, rows.prompts[some], rows.answers[some]))
                    context.progress(phase, len(values), len(share))
            del model  # else two policies would be in memory while the next one is loaded
        return values

    logprobs = iter(in_shares(context, spans, logprobs_of))
    return {key: [value for _ in rows.micro_batches() for value in next(logprobs)] for key, rows in asked.items()}
