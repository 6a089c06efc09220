"""Rows that are too long, for the model's positions or for memory, stop a stage before its first step."""

from __future__ import annotations

import json
import math
import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from alignment import worker
from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.optim import OptimConfig
from alignment.config.replay import PtxConfig
from alignment.config.validation import ValidationConfig
from alignment.core.errors import ModelError, StageError
from alignment.job import StageSpec
from alignment.records.step_log import METRICS
from alignment.records.worker import Status
from alignment.stages.sft.config import SftConfig
from alignment.training import longest_batch, row_lengths
from alignment.training.adamw import RandomlyRoundedAdamW
from alignment.training.context import StageContext
from alignment.training.longest_batch import LongestBatch, largest
from alignment.training.micro_batches import MicroBatches
from alignment.training.row_lengths import longest_sequences, row_tokens
from tests.chained import DATA, FILES, LORA, Chained, config_of
from tests.living import in_child
from tests.tiny import save_tiny_model

KINDS = ("sft", "dpo", "kto")


@pytest.mark.parametrize(
    ("tokens", "limit", "most", "padded", "expected"),
    [
        ([3, 9, 5, 1, 4], 13, 9, False, [1, 4]),  # 9 and 4 fill it; 5 does not fit
        ([3, 9, 5, 1, 4], 100, 3, False, [1, 2, 4]),
        ([3, 9, 5, 1, 4], 9, 9, False, [1]),
        ([3, 9, 5, 1, 4], 2, 9, False, [1]),  # a longer row is alone
        ([3, 9, 5, 1, 4], 18, 9, False, [1, 2, 4]),
        ([6, 6, 6], 12, 9, False, [2, 1]),
        ([3, 9, 5, 1, 4], 13, 9, True, [1, 3, 0]),  # three rows of nine
        ([3, 9, 5, 1, 4], 100, 3, True, [1, 3, 0]),
        ([3, 9, 5, 1, 4], 2, 9, True, [1]),
        ([7], 100, 9, False, [0]),
    ],
)
def test_it_has_the_longest_row_and_what_fits_beside_it(
    tokens: list[int], limit: int, most: int, padded: bool, expected: list[int]
) -> None:
    assert largest(np.array(tokens), limit=limit, most=most, padded=padded) == expected


class Tried:
    """What stages tried: rows, and the bytes held for moments meanwhile."""

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


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_it_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a random number: adapters have dropout where a stage may have it."""
    adapter = AdapterConfig(rank=4, dropout=0.2) if kind == "sft" else LORA
    monkeypatch.setattr(longest_batch, "SHARE", 0.0)
    plain = Chained(tmp_path / "plain")
    expected = plain.run(kind, adapter)
    tried = Tried(monkeypatch)
    other = Chained(tmp_path / "tried")
    assert without_times(other.run(kind, adapter)) == without_times(expected)
    assert len(tried.rows) == 1
    artifacts = [chained.inputs[kind].path for chained in (plain, other)]
    assert weights_of(artifacts[0]) == weights_of(artifacts[1])
    trained = sum(p.numel() for p in trained_weights(other, kind, adapter))
    assert tried.moments == [2 * 4 * trained], "two float32 moments of every trained weight"


def test_what_comes_after_it_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every process, and before a step is logged: errors and peaks of memory name the phase."""
    reports: list[tuple[str, int]] = []
    own = StageContext.progress

    def progress(context: StageContext, phase: str, step: int = 0, total: int | None = None, **figures: float) -> None:
        reports.append((phase, step))
        own(context, phase, step, total, **figures)

    monkeypatch.setattr(StageContext, "progress", progress)
    Tried(monkeypatch)
    Chained(tmp_path).run("sft", LORA)
    tried = reports.index(("trying the longest batch", 0))
    assert reports[tried + 1] == ("training", 0)


def trained_weights(chained: Chained, kind: str, adapter: AdapterConfig) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    folder = chained.inputs[kind].path
    assert folder is not None
    files = sorted(folder.glob("adapters/*/adapter_model.safetensors"))
    return [weight for file in files for weight in load_file(file).values()]


def test_moments_of_bfloat16_weights_without_masters_take_two_bytes_each() -> None:
    weight = torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.zeros(7), requires_grad=False)
    optimizer = RandomlyRoundedAdamW([weight, frozen], seed=1)
    assert sum(part.nbytes for part in longest_batch._memory_for_moments(optimizer)) == 2 * 2 * 100
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert longest_batch._memory_for_moments(optimizer) == [], "it has them"


def test_a_short_training_meets_its_longest_batch_soon_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried(monkeypatch)
    monkeypatch.setattr(longest_batch, "SHARE", 0.01)
    Chained(tmp_path).run("sft", LORA)
    assert tried.rows == []


def failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fits: Callable[[int], bool], **changes: Any
) -> StageError:
    """What the stage raises if only micro-batches of so many tokens find memory that ``fits`` says so."""
    Tried(monkeypatch, fits)
    chained = Chained(tmp_path)
    with pytest.raises(StageError) as raised:
        chained.run(kind, LORA, **{"config": config_of(kind, LORA), **changes})
    return raised.value


def rows_in(folder: Path, kind: str) -> Path:
    """Eight of the shipped rows; the third is by far the longest."""
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in (DATA / f"{FILES[kind]}.jsonl").read_text().splitlines()[:8]]
    if kind == "sft":
        rows[2]["messages"][-1]["content"] += "the hall " * 400
    else:
        rows[2]["chosen"] += "the hall " * 400
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_the_error_names_a_limit_that_was_seen_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of it does not fit, the second does."""
    attempts: list[int] = []

    def third(tokens: int) -> bool:
        attempts.append(tokens)
        return len(attempts) == 3

    error = failure(tmp_path, monkeypatch, "sft", third)
    assert f"4 rows with {attempts[0]} tokens, does not fit into memory (this was tried before" in str(error)
    assert error.where == "stages.sft.optim.micro_batch_tokens"
    assert "stages.sft.optim.activation_checkpointing=true" in error.remedy
    named = re.search(r"set stages\.sft\.optim\.micro_batch_tokens=(\d+), which fits", error.remedy)
    assert named is not None, error.remedy
    assert attempts[0] // 8 < int(named[1]) <= attempts[1] // 2


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_row_that_is_too_long_alone_is_named_with_its_origin(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(lr=1e-2, batch_size=4, warmup_ratio=0.0, micro_batch_tokens=8, activation_checkpointing=True)
    config = replace(config_of(kind, LORA), optim=optim)
    error = failure(tmp_path, monkeypatch, kind, lambda tokens: False, config=config, data_path=rows_in(tmp_path, kind))
    assert re.search(rf"the longest row, of \d+ tokens \({tmp_path}/rows\.jsonl:3\), does not fit", str(error))
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


POSITIONS = 1200
"""More than any of the shipped rows has tokens."""


def test_tokens_are_counted_in_the_columns_that_hold_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lengths, "BLOCK", 2)
    pairs = Dataset.from_dict(
        {
            "prompt_ids": [[1], [1, 2], [3]],
            "chosen_ids": [[1, 2, 3], [4], [5]],
            "rejected_ids": [[9, 9], [9], []],
            "KL_completion_ids": [[9, 9, 9]] * 3,
            "margin": [0.5, 1.0, 2.0],
        }
    )
    assert row_tokens(pairs).tolist() == [6, 4, 2]
    assert row_tokens(pairs.select([2, 0])).tolist() == [2, 6]
    assert row_tokens(pairs, prompts_twice=True).tolist() == [7, 6, 3]
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    assert row_tokens(rows).tolist() == [3, 1]


def test_a_sequence_is_a_prompt_with_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lengths, "BLOCK", 2)
    answers = Dataset.from_dict(
        {
            "prompt_ids": [[1], [1, 2], [3]],
            "completion_ids": [[1, 2, 3], [4], []],
            "KL_completion_ids": [[9], [9, 9], []],
            "label": [True, False, True],
        }
    )
    assert longest_sequences(answers).tolist() == [4, 4, 1]
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    assert longest_sequences(rows).tolist() == [3, 1]
    packed = Dataset.from_dict({"input_ids": [[1] * 7, [2] * 5, [3] * 2], "seq_lengths": [[3, 4], [5], [1, 1]]})
    assert longest_sequences(packed).tolist() == [4, 5, 1]


def with_a_long_row(folder: Path, kind: str) -> Path:
    """Eight of the shipped rows after the first eight; the third has a very long answer, or prompt for PPO."""
    file = folder / "rows.jsonl"
    shipped = (DATA / f"{FILES.get(kind, 'preferences')}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in shipped[8:16]]
    if kind in ("sft", "ppo"):
        rows[2]["messages"][-1]["content"] += " the hall" * 1000
    else:
        rows[2]["chosen"] += " the hall" * 1000
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def refusal(folder: Path, kind: str, **changes: Any) -> str:
    """What the stage says of ``with_a_long_row`` before it takes a step, for a model of ``POSITIONS`` positions."""
    chained = Chained(folder)
    if kind == "ppo":
        chained.run("reward", LORA)
    save_tiny_model(chained.base, max_position_embeddings=POSITIONS)
    settings = {"config": config_of(kind, LORA), "data_path": with_a_long_row(folder, kind), **changes}
    with pytest.raises(ModelError) as raised:
        chained.run(kind, LORA, **settings)
    assert not (chained.spec(kind, LORA).work / "content" / METRICS).exists(), "no step was taken"
    return str(raised.value)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "ppo"])
def test_a_row_beyond_the_positions_stops_a_stage_before_it_learns(kind: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, kind)
    assert re.search(rf"rows\.jsonl:3: a row of \d+ tokens is longer than the model's {POSITIONS} positions", message)


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


def test_a_reference_does_not_read_rows_that_are_too_long(tmp_path: Path) -> None:
    config: Any = config_of("dpo", LORA)
    assert "rows.jsonl:3: a row of" in refusal(tmp_path, "dpo", config=replace(config, precompute_reference=True))


def test_conversations_beside_ppo_are_checked_before_its_first_update(tmp_path: Path) -> None:
    (tmp_path / "ptx").mkdir()
    conversations = with_a_long_row(tmp_path / "ptx", "sft")
    ptx = PtxConfig(coefficient=1.0, data=DataConfig(source=f"path:{conversations}"))
    message = refusal(
        tmp_path,
        "ppo",
        config=config_of("ppo", LORA, ptx=ptx),
        data_path=DATA / "preferences.jsonl",
        extra_data={"ptx.data": conversations},
    )
    assert message.startswith(f"{conversations}:3: a row of ")


def test_held_out_rows_are_checked_before_training_too(tmp_path: Path) -> None:
    held_out = with_a_long_row(tmp_path, "sft")
    validation = ValidationConfig(every=2, data=DataConfig(source=f"path:{held_out}"))
    message = refusal(
        tmp_path,
        "sft",
        config=config_of("sft", LORA, validation=validation),
        data_path=DATA / "conversations.jsonl",
        extra_data={"validation.data": held_out},
    )
    assert message.startswith("row 3 of the held-out rows: a row of ")
