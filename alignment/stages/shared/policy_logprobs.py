"""Log-probabilities of rows under several policies, which the processes of a stage compute together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from alignment.evaluation.arms import TOKENS, sequence_logprobs
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import micro_batches_of
from alignment.models.kernels.layout import prepacked
from alignment.stages.shared.arm_policies import Policies
from alignment.stages.shared.process_shares import in_shares
from alignment.training.context import StageContext

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
    """Sum of log p(token | prefix) over each answer, in nats, on every process; every process must call this.

    The processes divide the micro-batches. A process loads the policies of its own, one at a time. Progress is reported
    as ``phase``.

    Raises:
        ModelError: a policy cannot be loaded, or its head does more than one matrix product.
    """
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
