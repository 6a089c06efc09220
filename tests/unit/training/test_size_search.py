"""Which sizes of micro-batches are tried, and which is chosen, by memory that is really taken and time that passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from datasets import Dataset

from alignment.config.model import Critic
from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.stages.ppo import learn
from alignment.stages.ppo.answer_trials import AnswerTrials
from alignment.stages.ppo.config import Advantage
from alignment.training import session, size_search
from alignment.training.callbacks import WeightsAreSharded
from alignment.training.context import PhasePeaks, StageContext
from alignment.training.longest_batch import RowTrials
from alignment.training.size_search import Choice, Outcome, SizeChosen, SizeSearch, attainable, expected, sizes
from tests.unit.training.ppo_bench import Bench

CPU = torch.device("cpu")
MB = 1 << 20


class Rows:
    """Rows of 10 to 20 tokens, 70 in all, of which each token takes so many MB and so much time."""

    def __init__(
        self, *, mb: float = 0.0, seconds: Callable[[int], float] = lambda tokens: 0.0, most: int = 10**9
    ) -> None:
        self.limits: list[int] = []
        self._mb, self._seconds, self._most = mb, seconds, most

    def bounds(self) -> tuple[int, int]:
        return 20, 70

    def least_step(self) -> int:
        return self._step(10)

    def step(self, limit: int) -> int:
        if self.limits[-1:] != [limit]:
            self.limits.append(limit)
        return self._step(limit)

    def _step(self, tokens: int) -> int:
        if tokens > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        block = bytearray(b"x") * int(tokens * self._mb * MB)
        time.sleep(self._seconds(tokens))
        del block
        return tokens


def chosen(rows: Rows, monkeypatch: pytest.MonkeyPatch, *, memory: float = 1e15, faster: float = 0.0) -> Choice:
    """The choice of a process that can have so much ``memory``."""
    monkeypatch.setattr(size_search, "FASTER", faster)
    return SizeSearch(device=CPU, memory=lambda _: memory, where="stages.sft.optim").choice(rows)


def test_sizes_are_doubled_from_the_longest_row_up_to_the_largest_micro_batch() -> None:
    assert list(sizes(3, 10)) == [3, 6, 10]
    assert list(sizes(3, 12)) == [3, 6, 12]
    assert list(sizes(7, 7)) == [7]
    assert list(sizes(7, 5)) == [7]


def test_the_largest_is_chosen_where_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows()
    choice = chosen(rows, monkeypatch)
    assert (choice.tokens, rows.limits) == (70, [20, 40, 70])
    assert [(size.limit, size.tokens, size.fits) for size in choice.tried] == [
        (20, 20, True),
        (40, 40, True),
        (70, 70, True),
    ]


def test_out_of_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the allocator says so."""
    rows = Rows(most=50)
    choice = chosen(rows, monkeypatch)
    assert (choice.tokens, rows.limits) == (40, [20, 40, 70])
    assert [size.fits for size in choice.tried] == [True, True, False]


def test_a_size_that_takes_more_than_its_share_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 and 40 tokens take 80 and 160 MB, so 70 would take 280.

    They would fit into 320 MB beside the 1,000 that the process holds, but not with a tenth of all memory left.
    """
    rows, held = Rows(), 1000 * MB

    class Peaks(PhasePeaks):
        def end(self) -> None:
            self.resident[size_search.PHASE] = held + 4.0 * MB * (rows.limits or [10])[-1]

    monkeypatch.setattr(size_search, "PhasePeaks", Peaks)
    choice = chosen(rows, monkeypatch, memory=held + 320.0 * MB)
    assert (choice.tokens, rows.limits) == (40, [20, 40])
    assert choice.tried[1].bytes - choice.tried[0].bytes == 80 * MB


def test_the_memory_of_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = chosen(Rows(mb=20.0), monkeypatch).tried
    assert tried[-1].bytes - tried[0].bytes > 900 * MB


def test_trials_take_place_on_weights_that_are_cut_as_in_the_training(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would train whole weights, in the format of their file."""
    cut: list[Any] = []

    @contextmanager
    def cut_by_module(model: Any, _: StageContext) -> Iterator[None]:
        cut.append(model)
        yield
        cut.clear()

    class Search:
        def run(self, trainer: Any, trials: Any) -> NoReturn:
            assert cut == [trainer.model]
            raise SizeChosen(Choice(tokens=3, tried=()))

    monkeypatch.setattr(session, "cut_by_module", cut_by_module)
    trainer: Any = SimpleNamespace(model="model", add_callback=lambda callback: callbacks.append(callback))
    callbacks: list[Any] = []
    with pytest.raises(SizeChosen):
        session._seek_size(Search(), trainer, context, Rows())
    assert [type(callback) for callback in callbacks] == [WeightsAreSharded]


def test_one_process_on_a_gpu_tries_what_it_does_not_expect_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lack of memory is an error. With several processes it would leave the others waiting."""
    search = SizeSearch(device=torch.device("cuda"), memory=lambda _: 0.0, where="")
    twice = [Outcome(tokens=20, bytes=10.0), Outcome(tokens=20, bytes=10.0)]
    assert search._may_fit(twice, 40, 15.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(size_search, "everyones", lambda value: [value])
    assert not search._may_fit(twice, 40, 15.0)
    assert search._may_fit(twice, 30, 15.0)


def test_a_longest_row_that_does_not_fit_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StageError, match="not even the longest row, of 20 tokens, fits into 90% of the memory"
    ) as raised:
        chosen(Rows(), monkeypatch, memory=1e6)
    assert raised.value.where == "stages.sft.optim.micro_batch_tokens"
    assert "set stages.sft.optim.activation_checkpointing=true" in raised.value.remedy


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(seconds=lambda tokens: float("nan"))
    with pytest.raises(ValueError, match=r"nan|NaN"):
        chosen(rows, monkeypatch)


def test_on_a_cpu_a_larger_size_must_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 and 667 tokens a second, then 583."""
    seconds, now = {10: 0.0, 20: 0.05, 40: 0.06, 70: 0.12}, [0.0]

    def passing(tokens: int) -> float:
        now[0] += seconds[tokens]
        return 0.0  # a real sleep would take longer on a busy machine

    monkeypatch.setattr(size_search, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rows = Rows(seconds=passing)
    choice = chosen(rows, monkeypatch, faster=1.05)
    assert (choice.tokens, rows.limits) == (40, [20, 40, 70])
    assert choice.tried[2].fits


@pytest.mark.parametrize(
    ("outcomes", "tokens", "bytes_"),
    [
        ([(10, 100.0)], 30, 300.0),  # through 0
        ([(10, 100.0), (20, 120.0)], 40, 160.0),
        ([(10, 100.0), (20, 120.0), (40, 200.0)], 80, 360.0),  # the last two
        ([(10, 100.0), (20, 120.0), (20, 130.0)], 40, 190.0),  # two alike: the one before
        ([(10, 100.0), (20, 90.0)], 40, 90.0),  # never less
    ],
)
def test_what_a_size_will_take_lies_on_a_line(outcomes: Any, tokens: int, bytes_: float) -> None:
    points = [Outcome(tokens=number, bytes=size) for number, size in outcomes]
    assert expected(points, tokens) == pytest.approx(bytes_)
    assert expected([None, *points], tokens) == pytest.approx(bytes_)


@pytest.mark.parametrize(("processes", "share"), [(None, 8e9), ("1", 8e9), ("4", 2e9)])
def test_processes_on_a_machine_share_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, share: float
) -> None:
    """Each also has what it holds already, here 1 GB."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9))
    monkeypatch.setattr(size_search, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(hardware, "free_memory", lambda: 8e9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert attainable(CPU) == 1e9 + share


# ---- the rows that are tried ----------------------------------------------------------------------------------------


class Trainer:
    """What trials ask of one of TRL's trainers."""

    def __init__(self, lengths: list[int], *, batch: int) -> None:
        self.train_dataset = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        self.unit = None
        self.args = type("Arguments", (), {"per_device_train_batch_size": batch})
        self.model = type("Model", (), {"config": type("Config", (), {"_attn_implementation": "flat"})})
        self.learned: list[tuple[int, list[int]]] = []

    def learn_rows(self, rows: list[int]) -> None:
        self.learned.append((self.micro_batch_tokens, rows))

    micro_batch_tokens = 0


def test_rows_are_the_longest_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.training.longest_batch.ATTENTION", "flat")
    trainer: Any = Trainer([3, 9, 5, 1, 4], batch=3)
    trials = RowTrials(trainer)
    assert trials.bounds() == (9, 18)
    assert [trials.least_step(), trials.step(9), trials.step(13), trials.step(18)] == [1, 9, 13, 18]
    assert trainer.learned == [(1, [3]), (9, [1]), (13, [1, 4]), (18, [1, 2, 4])]


LONG = [[6] * 16, [5] * 20, [7] * 18, [8] * 17]
CRITIC_FREE = {"advantage": Advantage.rloo, "critic": Critic.none}


@pytest.mark.parametrize(
    ("group", "settings", "tokens"),
    [
        (1, {}, [26, 22, 23, 24]),  # the longest prompt, then the others from the shortest on
        (1, {"critic": Critic.shared}, [26, 22, 23, 24]),
        (2, {}, [26, 6, 22, 6]),  # two prompts, whose second answers share them
        (2, CRITIC_FREE, [26, 6, 22, 6]),
    ],
)
def test_answers_are_as_long_as_they_can_get(
    bench: Callable[..., Bench],
    group: int,
    settings: dict[str, Any],
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight answers of six tokens in two minibatches, so four rows each."""
    run = bench(prompts=LONG, completions_per_prompt=group, **settings)
    run.trainer.create_optimizer_and_scheduler(num_training_steps=4)
    run.trainer.model_wrapped = run.trainer.model
    streams: list[int] = []
    own = learn.answer_stream

    def answer_stream(*rows: Any) -> Any:
        streams.append(len(own(*rows).rows.input_ids))
        return own(*rows)

    monkeypatch.setattr(learn, "answer_stream", answer_stream)
    trials = AnswerTrials(run.trainer)
    ends = list(accumulate(tokens))
    assert trials.bounds() == (26, ends[-1])
    assert trials.least_step() == 22
    assert [trials.step(limit) for limit in (26, ends[2] - 1, ends[2], 1000)] == [26, ends[1], ends[2], ends[3]]
    assert streams == [22, 26, ends[1], ends[2], ends[3]], "each is one micro-batch"
    weights = [weight for weight in run.roles.actor_critic.parameters() if weight.requires_grad]
    assert set(run.trainer.optimizer.state) == set(weights), "the optimiser has its moments"
    assert all(weight.grad is None for weight in weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_largest_size_within_its_share_is_chosen(bench: Callable[..., Bench]) -> None:
    """Not yet run on a GPU. A limited share of its memory makes a large size fail for real."""
    run = bench(prompts=[[5] * 900] * 8, max_new_tokens=124)
    device = run.context.device
    before = torch.cuda.memory_allocated(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (before + (64 << 20)) / total), device)
    try:
        search = SizeSearch(device=device, memory=lambda _: before + float(64 << 20), where="stages.ppo.optim")
        with pytest.raises(SizeChosen) as chosen_size:
            search.run(run.trainer, AnswerTrials(run.trainer))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    choice = chosen_size.value.choice
    fitting = [size for size in choice.tried if size.fits]
    assert choice.tokens == fitting[-1].limit
    assert fitting[-1].bytes <= size_search.SAFE_SHARE * (before + (64 << 20))
