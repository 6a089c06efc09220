"""How large micro-batches may be: sizes that are searched, and rows too long for memory or the model's positions."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from alignment import worker
from alignment.config.data import DataConfig, PtxConfig, ValidationConfig
from alignment.config.model import AdapterConfig, Critic
from alignment.config.optim import Moments, OptimConfig
from alignment.core import hardware
from alignment.core.errors import ModelError, StageError
from alignment.job import StageSpec
from alignment.models.forward.attention import ATTENTION
from alignment.records.training import METRICS
from alignment.records.worker import Status
from alignment.stages.ppo import learn
from alignment.stages.ppo.config import Advantage
from alignment.stages.ppo.trainer_setup import AnswerTrials
from alignment.stages.sft.kind import SftConfig
from alignment.training import longest_batch, size_search
from alignment.training.context import PhasePeaks, StageContext
from alignment.training.longest_batch import LongestBatch, RowTrials, largest, longest_sequences, row_tokens
from alignment.training.micro_batches import MicroBatches
from alignment.training.optimizer import RandomlyRoundedAdamW, adamw
from alignment.training.size_search import Choice, Outcome, SizeSearch, attainable, expected
from tests.chained import DATA, FILES, LORA, Chained, config_of
from tests.living import in_child
from tests.tiny import save_tiny_model
from tests.unit.training.ppo_bench import Bench


@pytest.mark.parametrize(
    ("tokens", "limit", "most", "padded", "expected"),
    [
        ([3, 9, 5, 1, 4], 13, 9, False, [1, 4]),  # 9 and 4 fill it; 5 does not fit
        ([3, 9, 5, 1, 4], 100, 3, False, [1, 2, 4]),
        ([3, 9, 5, 1, 4], 2, 9, False, [1]),  # a longer row is alone
        ([6, 6, 6], 12, 9, False, [2, 1]),
        ([3, 9, 5, 1, 4], 13, 9, True, [1, 3, 0]),  # three rows of nine
        ([3, 9, 5, 1, 4], 100, 3, True, [1, 3, 0]),
        ([7], 100, 9, False, [0]),
    ],
)
def test_it_has_the_longest_row_and_what_fits_beside_it(
    tokens: list[int], limit: int, most: int, padded: bool, expected: list[int]
) -> None:
    assert largest(np.array(tokens), limit=limit, most=most, padded=padded) == expected


class Tried:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: Callable[[int], bool] = lambda tokens: True) -> None:
        self.rows: list[list[int]] = []
        self.moments: list[int] = []
        own_memory, own_try = longest_batch._memory_for_moments, MicroBatches.try_rows

        def memory(optimizer: Any) -> list[torch.Tensor]:
            held = own_memory(optimizer)
            self.moments.append(sum(part.nbytes for part in held))
            return held

        def try_rows(trainer: MicroBatches, rows: Any) -> None:
            self.rows.append(list(rows))
            if not fits(int(row_tokens(trainer.train_dataset)[list(rows)].sum())):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            own_try(trainer, rows)

        monkeypatch.setattr(longest_batch, "SHARE", 1e9)
        monkeypatch.setattr(longest_batch, "_memory_for_moments", memory)
        monkeypatch.setattr(MicroBatches, "try_rows", try_rows)


def weights_of(artifact: Path) -> dict[str, bytes]:
    return {str(p.relative_to(artifact)): p.read_bytes() for p in sorted(artifact.rglob("*.safetensors"))}


def without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_nothing_of_it_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a random number: adapters have dropout where a stage may have it. What comes after it is training."""
    adapter = AdapterConfig(rank=4, dropout=0.2) if kind == "sft" else LORA
    monkeypatch.setattr(longest_batch, "SHARE", 0.0)
    plain = Chained(tmp_path / "plain")
    expected = plain.run(kind, adapter)
    tried, phases = Tried(monkeypatch), []
    own = StageContext.progress

    def progress(context: StageContext, phase: str, *numbers: Any, **figures: float) -> None:
        phases.append(phase)
        own(context, phase, *numbers, **figures)

    monkeypatch.setattr(StageContext, "progress", progress)
    other = Chained(tmp_path / "tried")
    assert without_times(other.run(kind, adapter)) == without_times(expected)
    assert len(tried.rows) == 1
    at = phases.index("trying the longest batch")
    assert phases[at + 1] == "training"
    artifacts = [chained.inputs[kind].path for chained in (plain, other)]
    assert artifacts[0] is not None
    assert artifacts[1] is not None
    assert weights_of(artifacts[0]) == weights_of(artifacts[1])
    files = sorted(artifacts[1].glob("adapters/*/adapter_model.safetensors"))
    trained = sum(weight.numel() for file in files for weight in load_file(file).values())
    assert tried.moments == [2 * 4 * trained], "two float32 moments of every trained weight"


def test_moments_take_as_many_bytes_as_the_optimiser_will_give_them(context: StageContext) -> None:
    """Of bfloat16 weights without masters two each, in eight bits one."""
    weight = torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.zeros(7), requires_grad=False)
    optimizer = RandomlyRoundedAdamW([weight, frozen], seed=1)
    assert sum(part.nbytes for part in longest_batch._memory_for_moments(optimizer)) == 2 * 2 * 100
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert longest_batch._memory_for_moments(optimizer) == [], "it has them"
    kind, settings = adamw([], context, lr=1e-2, eps=1e-8, moments=Moments.eight_bit)
    eight_bit = kind([torch.nn.Parameter(torch.zeros(8192))], **settings)
    assert sum(part.nbytes for part in longest_batch._memory_for_moments(eight_bit)) == 2 * 8192


def test_a_short_training_meets_its_longest_batch_soon_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried(monkeypatch)
    monkeypatch.setattr(longest_batch, "SHARE", 0.01)
    Chained(tmp_path).run("sft", LORA)
    assert tried.rows == []


def failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fits: Callable[[int], bool], **changes: Any
) -> StageError:
    Tried(monkeypatch, fits)
    chained = Chained(tmp_path)
    with pytest.raises(StageError) as raised:
        chained.run(kind, LORA, **{"config": config_of(kind, LORA), **changes})
    return raised.value


def test_the_error_names_the_batch_and_settings_that_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failure(tmp_path, monkeypatch, "sft", lambda tokens: False)
    assert re.search(r"4 rows with \d+ tokens, does not fit into memory \(this was tried before", str(error))
    assert error.where == "stages.sft.optim.micro_batch_tokens"
    for setting in ("activation_checkpointing=true", "micro_batch_tokens=auto"):
        assert f"stages.sft.optim.{setting}" in error.remedy


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_a_row_that_is_too_long_alone_is_named_with_its_origin(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(lr=1e-2, batch_size=4, warmup_ratio=0.0, micro_batch_tokens=8, activation_checkpointing=True)
    config, data = replace(config_of(kind, LORA), optim=optim), with_a_long_row(tmp_path, kind)
    error = failure(tmp_path, monkeypatch, kind, lambda tokens: False, config=config, data_path=data)
    assert re.search(rf"the longest row, of \d+ tokens \({data}:3\)", str(error))
    assert "activation_checkpointing" not in error.remedy, "it is on already"


def test_memory_that_the_system_refuses_ends_the_stage_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real lack: the process may take 16 MB more than it has when the trial begins, and a row needs more."""
    chained = Chained(tmp_path)
    save_tiny_model(chained.base, max_position_embeddings=65536)
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the hall " * 8000}]}
    short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the hall"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in [*[short] * 5, long, *[short] * 6]))
    monkeypatch.setattr(longest_batch, "SHARE", 1e9)
    own = LongestBatch.on_train_begin

    def on_train_begin(self: LongestBatch, *args: Any, **kwargs: Any) -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
        own(self, *args, **kwargs)

    monkeypatch.setattr(LongestBatch, "on_train_begin", on_train_begin)
    optim = OptimConfig(lr=1e-2, batch_size=4, warmup_ratio=0.0)
    config = SftConfig(optim=optim, max_length=65536, adapter=LORA)
    spec = chained.spec("sft", LORA, config=config, data_path=data)
    assert in_child(lambda: worker.main(written(spec))) == 5
    error = Status.read(spec.run_folder).error
    assert "the longest row, of " in error
    assert f"({data}:6)" in error
    assert not (spec.work / "content/metrics.jsonl").exists(), "no step was taken"


def written(spec: StageSpec) -> Path:
    worker.read_spec = lambda _: spec
    return spec.run_folder / "stage.yaml"


def with_a_long_row(folder: Path, kind: str) -> Path:
    file = folder / "rows.jsonl"
    shipped = (DATA / f"{FILES.get(kind, 'preferences')}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in shipped[8:16]]
    if kind in ("sft", "ppo"):
        rows[2]["messages"][-1]["content"] += " the hall" * 1000
    else:
        rows[2]["chosen"] += " the hall" * 1000
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


POSITIONS = 1200
"""More than any of the shipped rows has tokens."""


def test_tokens_are_counted_in_the_columns_that_hold_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is a prompt with its longest answer."""
    monkeypatch.setattr(longest_batch, "BLOCK", 2)
    answers = {"prompt_ids": [[1], [1, 2], [3]], "chosen_ids": [[1, 2, 3], [4], [5]], "rejected_ids": [[9, 9], [9], []]}
    pairs = Dataset.from_dict({**answers, "KL_completion_ids": [[9, 9, 9, 9]] * 3, "margin": [0.5, 1.0, 2.0]})
    assert row_tokens(pairs).tolist() == [6, 4, 2]
    assert row_tokens(pairs.select([2, 0])).tolist() == [2, 6]
    assert row_tokens(pairs, prompts_twice=True).tolist() == [7, 6, 3]
    assert longest_sequences(pairs).tolist() == [5, 6, 5]
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    assert row_tokens(rows).tolist() == longest_sequences(rows).tolist() == [3, 1]
    packed = Dataset.from_dict({"input_ids": [[1] * 7, [2] * 5, [3] * 2], "seq_lengths": [[3, 4], [5], [1, 1]]})
    assert longest_sequences(packed).tolist() == [4, 5, 1]


def refusal(folder: Path, kind: str, **changes: Any) -> str:
    chained = Chained(folder)
    if kind == "ppo":
        chained.run("reward", LORA)
    save_tiny_model(chained.base, max_position_embeddings=POSITIONS)
    with pytest.raises(ModelError) as raised:
        chained.run(kind, LORA, **{"data_path": with_a_long_row(folder, kind), **changes})
    assert not (chained.spec(kind, LORA).work / "content" / METRICS).exists(), "no step was taken"
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("sft", {}), ("reward", {}), ("dpo", {"precompute_reference": True}), ("kto", {}), ("ppo", {})],
    ids=["sft", "reward", "dpo, whose reference does not read it either", "kto", "ppo"],
)
def test_a_row_beyond_the_positions_stops_a_stage_before_it_learns(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    message = refusal(tmp_path, kind, config=config_of(kind, LORA, **changes))
    assert re.search(rf"rows\.jsonl:3: a row of \d+ tokens .* {POSITIONS} positions", message)


@pytest.mark.parametrize(
    ("kind", "field", "file", "named"),
    [
        ("ppo", "ptx", "preferences", "{}:3"),
        ("sft", "validation", "conversations", "row 3 of the held-out rows"),
    ],
)
def test_other_rows_of_a_stage_are_checked_before_its_first_step_too(
    tmp_path: Path, kind: str, field: str, file: str, named: str
) -> None:
    (tmp_path / "other").mkdir()
    rows = with_a_long_row(tmp_path / "other", "sft")
    data = DataConfig(source=f"path:{rows}")
    settings = {"ptx": PtxConfig(coefficient=1.0, data=data), "validation": ValidationConfig(every=2, data=data)}
    config = config_of(kind, LORA, **{field: settings[field]})
    data_path, extra = DATA / f"{file}.jsonl", {f"{field}.data": rows}
    message = refusal(tmp_path, kind, config=config, data_path=data_path, extra_data=extra)
    assert message.startswith(f"{named.format(rows)}: a row of ")


def test_mismatched_answers_are_cut_to_the_positions_where_these_are_fewer(tmp_path: Path) -> None:
    """Each row fits, but a long prompt and the long answer of another row would not."""
    question, answer = [{"role": "user", "content": "Why?" + " the hall" * 300}], " the hall" * 300
    rows = [
        {"messages": question, "chosen": "Yes.", "rejected": "No."},
        {"messages": [{"role": "user", "content": "Where?"}], "chosen": answer, "rejected": f"Not {answer}"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    chained = Chained(tmp_path / "chained")
    save_tiny_model(chained.base, max_position_embeddings=POSITIONS)
    steps = chained.run("kto", LORA, data_path=data)
    assert all(math.isfinite(step["kl"]) for step in steps if "kl" in step)


CPU = torch.device("cpu")
MB = 1 << 20


class Rows:
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
    monkeypatch.setattr(size_search, "FASTER", faster)
    return SizeSearch(device=CPU, memory=lambda _: memory, where="stages.sft.optim").choice(rows)


@pytest.mark.parametrize(("most", "expected"), [(10**9, 70), (50, 40)], ids=["all fit", "out of memory ends it"])
def test_the_largest_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch, most: int, expected: int) -> None:
    rows = Rows(most=most)
    choice = chosen(rows, monkeypatch)
    assert (choice.tokens, rows.limits) == (expected, [20, 40, 70])
    assert [(size.limit, size.fits) for size in choice.tried] == [(20, True), (40, True), (70, most > 50)]
    assert [size.tokens for size in choice.tried][:2] == [20, 40]


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
    tried = chosen(Rows(mb=4.0), monkeypatch).tried
    assert tried[-1].bytes - tried[0].bytes > 160 * MB


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
    with pytest.raises(StageError, match="of 20 tokens") as raised:
        chosen(Rows(), monkeypatch, memory=1e6)
    assert raised.value.where == "stages.sft.optim.micro_batch_tokens"
    assert "stages.sft.optim.activation_checkpointing=true" in raised.value.remedy


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


def test_rows_are_the_longest_that_fit() -> None:
    trainer: Any = SimpleNamespace(
        train_dataset=Dataset.from_dict({"input_ids": [[0] * length for length in (3, 9, 5, 1, 4)]}),
        unit=None,
        args=SimpleNamespace(per_device_train_batch_size=3),
        model=SimpleNamespace(config=SimpleNamespace(_attn_implementation=ATTENTION)),
        learn_rows=lambda rows: learned.append((trainer.micro_batch_tokens, rows)),
    )
    learned: list[tuple[int, list[int]]] = []
    trials = RowTrials(trainer)
    assert trials.bounds() == (9, 18)
    assert [trials.least_step(), trials.step(9), trials.step(13), trials.step(18)] == [1, 9, 13, 18]
    assert learned == [(1, [3]), (9, [1]), (13, [1, 4]), (18, [1, 2, 4])]


LONG = [[6] * 16, [5] * 20, [7] * 18, [8] * 17]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, [26, 22, 23, 24]),  # the longest prompt, then the others from the shortest on
        ({"critic": Critic.shared}, [26, 22, 23, 24]),
        # two prompts, whose second answers share them
        ({"completions_per_prompt": 2, "advantage": Advantage.rloo, "critic": Critic.none}, [26, 6, 22, 6]),
    ],
    ids=["separate", "shared", "none"],
)
def test_answers_are_as_long_as_they_can_get(
    bench: Callable[..., Bench], settings: dict[str, Any], tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight answers of six tokens in two minibatches, so four rows each."""
    run = bench(prompts=LONG, **settings)
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
