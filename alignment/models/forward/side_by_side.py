"""Work on two threads, and a stream's states in two parts side by side: with two cores a pass takes less time. The
results do not depend on which thread is faster: the sum of each part's gradients is complete before they are added."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from alignment.config.launch import DIVIDE_ROWS
from alignment.core.errors import ConfigError
from alignment.costs.recorder import on_shadows
from alignment.models.assembly.modules import products_dtype
from alignment.models.forward.rows import FlatRows, Segment, stream
from alignment.models.kernels.nf4 import Nf4Linear

THREADS = 2
LARGEST = 0.6
"""The larger share of the work from which two threads are no faster than before: a pass takes a fifth less time if the
shares are equal (docs/LOG.md, 2026-11-29), so what one of them gets more is lost beyond .6."""
_SWITCH_SECONDS = 0.0005
"""How soon a thread that runs Python lets the other one run it; by default ten times as long."""
_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


def has_two_threads(tensor: Tensor) -> bool:
    """Whether two threads of this CPU, and of this process alone, would share an operation on the tensor. In a part it
    is false, since its thread computes alone. So nothing is divided twice. Raises ConfigError: the variable of
    ``launch.divide_rows`` is neither 0 nor 1."""
    is_alone = not torch.distributed.is_initialized()  # else weights may be gathered for each module, in an order
    is_on_two = tensor.device.type == "cpu" and torch.get_num_threads() == THREADS
    return is_on_two and is_alone and not on_shadows() and _is_wanted()


def _is_wanted() -> bool:
    value = os.environ.get(DIVIDE_ROWS, "1")
    if value not in ("0", "1"):
        raise ConfigError(f"{value!r} is not allowed; allowed: 0, 1", where=DIVIDE_ROWS, remedy="correct or unset it")
    return value == "1"


def in_two_threads(function: Callable[[_Input], _Output], inputs: Sequence[_Input]) -> list[_Output]:
    """The function of both inputs, under this thread's settings of gradients and autocast, and no other modes. An error
    is raised when both have ended, so nobody computes with what the caller then puts back. If both fail, it is that of
    the first."""
    futures = [_part_threads(os.getpid()).submit(_in_same_mode(function), argument) for argument in inputs]
    try:
        try:
            wait(futures)
        except BaseException:  # a signal's
            wait(futures)
            raise
        return list(map(Future.result, futures))
    finally:
        del futures  # a future that failed, its error and this frame would hold each other


def balanced(costs: Sequence[int]) -> tuple[list[int], list[int]]:
    """The indices of pieces of work for each thread: largest first, to the one with less work (Graham 1969)."""
    shares: tuple[list[int], list[int]] = ([], [])
    work = [0, 0]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        less = int(work[1] < work[0])
        shares[less].append(index)
        work[less] += costs[index]
    return sorted(shares[0]), sorted(shares[1])


def can_share(costs: Sequence[int]) -> bool:
    """Whether none of two threads would have most of the work, so that they gain by sharing it."""
    largest = max(sum(costs[index] for index in share) for share in balanced(costs))
    return len(costs) >= THREADS and largest <= LARGEST * sum(costs)


def each_of(inputs: Sequence[_Input], function: Callable[[_Input], _Output], costs: Sequence[int]) -> list[_Output]:
    """The function of each input, in order, on two threads; ``can_share`` says whether that is faster."""
    shares = balanced(costs)
    outputs = in_two_threads(lambda share: [function(inputs[index]) for index in share], shares)
    of_index = {
        index: output
        for share, some in zip(shares, outputs, strict=True)
        for index, output in zip(share, some, strict=True)
    }
    return [of_index[index] for index in range(len(inputs))]


def _in_same_mode(function: Callable[[_Input], _Output]) -> Callable[[_Input], _Output]:
    """The function under this thread's settings of gradients and autocast, which other threads do not have."""
    has_grad = torch.is_grad_enabled()
    is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    @functools.wraps(function)
    def in_same_mode(argument: _Input) -> _Output:
        with torch.set_grad_enabled(has_grad), torch.autocast("cpu", dtype, enabled=is_cast):
            return function(argument)

    return in_same_mode


@functools.lru_cache(maxsize=1)
def _part_threads(process: int) -> ThreadPoolExecutor:
    """Two threads that compute alone; ``process`` is this process's number, since a fork has none of the threads."""
    threads = torch.get_num_threads()
    ready = threading.Barrier(THREADS + 1)

    def begin() -> None:
        torch.get_num_threads()  # else PyTorch would take the number that was set last at the first operation
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="part", initializer=begin)
    try:
        for _ in range(THREADS):
            pool.submit(int)
        ready.wait()
    except BaseException:
        ready.abort()  # else a thread would wait forever, and the process for it
        raise
    torch.set_num_threads(threads)  # threads that start later take the number that was set last
    sys.setswitchinterval(_SWITCH_SECONDS)
    return pool


TOKEN = 768
"""What a token costs apart from attention, as the length of a row in which its attention takes as long: SmolLM2-135M
with LoRA on two Intel cores (docs/LOG.md, 2026-11-29)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedRows:
    """Two streams with all rows of one. ``source [tokens]`` is, for each token of the whole stream, its index in the
    two parts one after the other. Tokens that both parts have are used from one of them."""

    parts: tuple[FlatRows, FlatRows]
    source: Tensor


def divided(rows: FlatRows) -> DividedRows | None:
    """The rows in two streams; None if one of these would be too large, as with a single row. Rows with a beginning in
    common stay together if possible. Else the shortest common beginnings, such as a system turn, are computed in both
    parts.

    Args:
        rows: on the CPU, and not behind an earlier stream."""
    limit = LARGEST * sum(_costs(rows))
    shared = [sum(end - start for start, end in segment.before) for segment in rows.segments]
    for longest_twice in (0, *sorted(set(shared) - {0})):
        first, second = _assigned(rows, shared, longest_twice)
        if not second:
            continue
        parts = _stream_of(rows, first), _stream_of(rows, second)
        if all(sum(_costs(part)) <= limit for part in parts):
            return DividedRows(parts=parts, source=_source(rows, (first, second), parts))
    return None


def _costs(rows: FlatRows) -> list[int]:
    lengths = zip(rows.segments, rows.lengths, strict=True)
    return [(segment.own[1] - segment.own[0]) * (TOKEN + length) for segment, length in lengths]


def _assigned(rows: FlatRows, shared: list[int], longest_twice: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows in each part if common beginnings of up to ``longest_twice`` tokens are computed in both."""
    twice = [tokens <= longest_twice for tokens in shared]
    costs = [
        cost + (tokens * (TOKEN + length) if again else 0)
        for cost, tokens, length, again in zip(_costs(rows), shared, rows.lengths, twice, strict=True)
    ]
    families = _families(rows.segments, twice)
    shares = balanced([sum(costs[row] for row in family) for family in families])
    first, second = (sorted(row for index in share for row in families[index]) for share in shares)
    return first, second


def _families(segments: tuple[Segment, ...], twice: list[bool]) -> list[list[int]]:
    family_of = list(range(len(segments)))
    for row, segment in enumerate(segments):
        if twice[row]:
            continue
        read = {family_of[other] for other in range(row) if _overlaps(segment, segments[other])}
        family_of = [row if family in read else family for family in family_of]
    return [[row for row, of_row in enumerate(family_of) if of_row == family] for family in dict.fromkeys(family_of)]


def _overlaps(segment: Segment, other: Segment) -> bool:
    return any(start < other.own[1] and other.own[0] < end for start, end in segment.before)


def _stream_of(rows: FlatRows, which: list[int]) -> FlatRows:
    tokens = [rows.input_ids[rows.index[row][rows.is_real[row]]].tolist() for row in which]
    return stream(tokens, rows.input_ids.device, share=any(segment.before for segment in rows.segments))


def _source(rows: FlatRows, which: tuple[list[int], list[int]], parts: tuple[FlatRows, FlatRows]) -> Tensor:
    source = torch.empty_like(rows.input_ids)
    for numbers, part, start in zip(which, parts, (0, len(parts[0].input_ids)), strict=True):
        # Both masks list the tokens of a row in order, row by row.
        source[rows.index[numbers][rows.is_real[numbers]]] = start + part.index[part.is_real]
    return source


WORTH_DIVIDING = 2**30
"""Tokens times weights per layer from which two parts are faster; below it Python takes most of the time
(SmolLM2-135M, docs/LOG.md, 2026-11-29)."""
FEW = 0.2
"""The share of weights up to which trained ones are few. Each part has gradients of all of them, before they are
added."""
_WHOLE = "alignment_in_one_stream"
"""The attribute of a trunk whose rows are never divided."""
_RANDOM = ("dropout", "layerdrop", "jitter_noise")
"""Endings of the names of rates with which modules of transformers draw random numbers in training."""
_ALONE = (Nf4Linear, ParamWrapper)
"""Modules of which only one thread may run a pass, or gains by it."""
States = Callable[[FlatRows], Tensor]
"""Computes ``[tokens, width]`` states of a stream."""


def keep_in_one_stream(model: PreTrainedModel) -> None:
    """Divides rows neither here nor in copies, if more than a few weights are trained. Passes with gradients would not
    be divided then, and in bfloat16, passes without gradients that are would give other log-probabilities than those
    that they are compared with."""
    parameters = list(model.base_model.parameters())
    if sum(each.numel() for each in parameters if each.requires_grad) > FEW * sum(each.numel() for each in parameters):
        setattr(model.base_model, _WHOLE, True)


def side_by_side(trunk: PreTrainedModel, states_of: States, rows: FlatRows) -> Tensor | None:
    """``states_of(rows)``, computed in two parts; None if the rows had better be computed at once. That is: for models
    that ``can_divide`` refuses, with little to compute, if more than a few weights are trained, or with rows that
    cannot be divided into two parts of about equal work."""
    if not can_divide(trunk) or not _is_worth_it(trunk, len(rows.input_ids)) or (division := divided(rows)) is None:
        return None
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not trained:
        states = in_two_threads(states_of, division.parts)
        return torch.cat(states).index_select(0, division.source)
    joined: Tensor = _SideBySide.apply(states_of, division, *trained)
    return joined


def can_divide(trunk: PreTrainedModel) -> bool:
    """Whether two threads may run passes of the model at once, and gain by it. They may not if modules draw random
    numbers, whose order would depend on the threads; if frequencies of positions are chosen anew by each pass
    (LongRoPE, Ding et al. 2024); or if weights are made for a call and dropped afterwards, by hooks or by PEFT's
    adapters on experts. They gain nothing if each would convert all weights for itself."""
    weight: Tensor = trunk.get_input_embeddings().weight
    if not has_two_threads(weight) or products_dtype(weight) is not weight.dtype or hasattr(trunk, _WHOLE):
        return False
    return not any(
        module._forward_pre_hooks or isinstance(module, _ALONE) or _draws(module) or _chooses_frequencies(module)
        for module in trunk.modules()
    )


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    is_dropout = isinstance(module, nn.Dropout) and module.p > 0
    return is_dropout or any(
        name.endswith(_RANDOM) and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items()
    )


def _chooses_frequencies(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    return "longrope" in (types.values() if isinstance(types, dict) else (types,))


def _is_worth_it(trunk: PreTrainedModel, tokens: int) -> bool:
    weights = trained = 0
    for parameter in trunk.parameters():
        weights += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    layers: int = trunk.config.get_text_config().num_hidden_layers
    has_few = not torch.is_grad_enabled() or trained <= FEW * weights
    return has_few and tokens * weights >= WORTH_DIVIDING * layers


class _SideBySide(torch.autograd.Function):
    """States of all rows. The parts' own graphs are kept, and end in the trained weights, which get the sums of their
    gradients."""

    @staticmethod
    def forward(ctx: Any, states_of: States, division: DividedRows, *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.states = in_two_threads(states_of, division.parts)
        ctx.source, ctx.trained = division.source, trained
        return torch.cat([states.detach() for states in ctx.states]).index_select(0, division.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths = [len(states) for states in ctx.states]
        grads = grad.new_zeros(sum(lengths), grad.shape[1]).index_copy_(0, ctx.source, grad).split(lengths)
        inputs = list(zip(ctx.states, grads, strict=True))
        ctx.states = None

        def gradients(inputs_of_part: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            states, own_grad = inputs_of_part
            if not states.requires_grad:  # what is trained has no part in them, such as adapters that are switched off
                return (None,) * len(ctx.trained)
            return torch.autograd.grad(states, ctx.trained, own_grad, allow_unused=True)

        first, second = (list(of_part) for of_part in in_two_threads(gradients, inputs))
        for index, gradient in enumerate(second):
            first[index], second[index] = _sum(first[index], gradient), None
        return None, None, *first


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
