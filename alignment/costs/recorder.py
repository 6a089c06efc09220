"""Records what a stage that runs on shadows would need: memory and operations, by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignment.costs.live_memory import LiveMemory
from alignment.costs.op_times import is_compiled
from alignment.costs.shadows import Key, Operation, Shadow, ShadowMode

WEIGHTS, GRADIENTS, OPTIMIZER, CACHE, LOGITS, ACTIVATIONS = (
    "weights",
    "gradients",
    "optimiser",
    "cache",
    "logits",
    "activations",
)
"""What memory is for. All that is none of the others counts as activations."""


_MOST_BATCHES = 8
"""Batches that are run on shadows beside the largest."""
_Batch = TypeVar("_Batch")
_Value = TypeVar("_Value")

Operations = Counter[Key]
"""How often each operation ran."""


@dataclass(slots=True)
class Phase:
    """The largest sum of live bytes in a phase with its terms, and operations. ``resident`` is the most that heap and
    files took, and ``compiled`` counts the shapes of products so far for which oneDNN has made code."""

    peak: int = 0
    resident: int = 0
    compiled: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    operations: Operations = field(default_factory=Counter)


class Recorder:
    """Collects the phases of one stage, which always tries its longest micro-batch unless ``tries_longest`` is false.
    ``period`` optimiser steps of ``all_steps`` were run last; ``step_operations`` are theirs, by phase, and
    ``tokens_of_period`` the tokens that they read, where ``mean_tokens`` a step are expected. ``trained`` and
    ``weights`` count numbers, ``trained_bytes`` those of the first. Held-out rows are read every ``look_every`` steps,
    and were read ``looks_taken`` times. ``moments`` are the bytes of the optimiser. ``periods_run`` periods ran, and
    the last one had ``compiled_in_period`` new shapes of products for which oneDNN has made code. An operation counts
    ``times`` times."""

    def __init__(self, *, for_gpu: bool = False, tries_longest: bool = True) -> None:
        self.for_gpu = for_gpu
        self.tries_longest = tries_longest
        self.memory = LiveMemory(label=ACTIVATIONS)
        self.phases: dict[str, Phase] = {}
        self.examples: dict[Key, Operation] = {}
        self.all_steps = 0
        self.period = 1
        self.step_operations: dict[str, Operations] = {}
        self.tokens_of_period = 0.0
        self.mean_tokens = 0.0
        self.trained = 0
        self.trained_bytes = 0
        self.copied_bytes = 0
        self.weights = 0
        self.look_every = 0
        self.looks_taken = 0
        self.moments = 0
        self.vocabulary = 0
        self.name = "starting"
        self.times = 1
        self.periods_run = 0
        self.compiled_in_period = 0
        self._compiled = 0
        self._compiled_before = 0
        self._made: dict[Hashable, tuple[Any, Operations]] = {}
        self._before: dict[str, Operations] = {}
        self._before_steps: dict[str, Operations] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Runs a ``with`` block on shadows and records it."""
        global _current
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # else a converted shadow would keep its old type
        _current = self
        self.phase(self.name)
        try:
            with ShadowMode(self._saw):
                yield
        finally:
            self._close()
            _current = None
            torch.__future__.set_swap_module_params_on_conversion(swaps)

    def phase(self, name: str) -> None:
        """Ends the phase that runs and goes on with this one, which may have run before."""
        self._close()
        self.name = name
        self.phases.setdefault(name, Phase())
        self.memory.begin()

    def has_model(self, vocabulary: int) -> None:
        """A model with so many tokens was loaded; matrices of that width are logits."""
        self.vocabulary = vocabulary

    def begin_steps(self, number: int, model: nn.Module, *, period: int) -> None:
        """The stage will train so many optimiser steps, of which ``period`` are alike."""
        self.all_steps, self.period = number, period
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in learned)
        self.trained_bytes = sum(parameter.nbytes for parameter in learned)
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        for parameter in learned:
            parameter.register_post_accumulate_grad_hook(self._relabel_gradient)  # type: ignore[no-untyped-call]
        self._mark()
        self._before_steps = self._before

    def end_period(self, tokens: float) -> None:
        """A period of steps ended, which read so many tokens."""
        self.tokens_of_period = tokens
        self.periods_run += 1
        self.compiled_in_period = self._compiled - self._compiled_before
        self.moments = self.memory.now[OPTIMIZER]
        self.step_operations = {
            name: phase.operations - self._before.get(name, Counter()) for name, phase in self.phases.items()
        }
        self._mark()

    def repeated(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """What was made before with this key; the operations of that count once more."""
        counted = self.phases[self.name].operations
        if key not in self._made:
            before = Counter(counted)
            value = make()
            self._made[key] = value, counted - before
            return value
        value, operations = self._made[key]
        counted.update(operations)
        return value

    def operations_outside_steps(self, name: str) -> Operations:
        """What a phase did before the first step and after the last one."""
        after = self.phases[name].operations - self._before.get(name, Counter())
        return after + self._before_steps.get(name, Counter())

    def _close(self) -> None:
        phase = self.phases.get(self.name)
        if phase is None:
            return
        phase.resident = max(phase.resident, self.memory.resident)
        phase.compiled = self._compiled
        if self.memory.peak > phase.peak:
            phase.peak, phase.parts = self.memory.peak, self.memory.parts

    def _mark(self) -> None:
        self._compiled_before = self._compiled
        self._before = {name: Counter(phase.operations) for name, phase in self.phases.items()}

    def _relabel_gradient(self, parameter: Tensor) -> None:
        if isinstance(parameter.grad, Shadow):
            self.memory.relabel(parameter.grad.meta, GRADIENTS)

    def _saw(self, key: Key, results: Sequence[Tensor], operation: Callable[[], Operation] | None) -> None:
        if results:
            self.memory.see(results, self._label_of(results))
        if operation is not None and key not in self.examples:
            self.examples[key] = operation()
            self._compiled += is_compiled(self.examples[key])
        self.phases[self.name].operations[key] += self.times

    def _label_of(self, results: Sequence[Tensor]) -> str:
        """Logits are known by their width; other memory has the label of the ``with`` block that it is taken in."""
        are_logits = self.memory.label == ACTIVATIONS and any(
            result.dim() > 1 and result.shape[-1] == self.vocabulary for result in results
        )
        return LOGITS if are_logits else ""


_current: Recorder | None = None


def recorder() -> Recorder | None:
    """The recorder while a stage runs on shadows, else None."""
    return _current


def on_shadows() -> bool:
    """Whether a stage runs on shadows, so that what it computes means nothing and is not to be judged."""
    return _current is not None


def some_of(batches: Sequence[_Batch], size: Callable[[_Batch], int]) -> Iterator[_Batch]:
    """All batches; on shadows only the largest and a few others, whose operations count for those left out. So the time
    of a plan does not grow with the number of rows."""
    if _current is None or len(batches) <= _MOST_BATCHES:
        yield from batches
        return
    largest = max(range(len(batches)), key=lambda index: size(batches[index]))
    yield batches[largest]
    others = [batch for index, batch in enumerate(batches) if index != largest]
    step = -(-len(others) // _MOST_BATCHES)
    for index in range(0, len(others), step):
        with counted_times(min(step, len(others) - index)):
            yield others[index]


def one_of_each(parts: Iterable[_Batch], size: Callable[[_Batch], int]) -> Iterator[_Batch]:
    """All parts; on shadows only one of each size, whose operations count for all of that size. They use the same
    memory, one after another."""
    if _current is None:
        yield from parts
        return
    parts = list(parts)
    left = Counter(map(size, parts))
    for part in parts:
        if times := left.pop(size(part), 0):
            with counted_times(times):
                yield part


def once_for_each(key: Hashable, make: Callable[[], _Value]) -> _Value:
    """What ``make`` returns; on shadows it is called once for each key, and its operations count each time. It must
    stay in one phase, and leave no memory that is in use later."""
    return make() if _current is None else _current.repeated(key, make)


@contextmanager
def counted_times(times: int) -> Iterator[None]:
    """Counts the operations of a ``with`` block so many times; without a recorder it does nothing."""
    if _current is None:
        yield
        return
    before = _current.times
    _current.times = before * times
    try:
        yield
    finally:
        _current.times = before


def memory_for(label: str) -> AbstractContextManager[None]:
    """Counts the memory that a ``with`` block takes as being for ``label``; without a recorder it does nothing."""
    return nullcontext() if _current is None else _current.memory.labelled(label)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether it is on a CPU, and not a shadow of one that will be on a GPU."""
    return tensor.device.type == "cpu" and not (_current is not None and _current.for_gpu)
