"""What saves memory changes neither weights nor metrics: micro-batches of any size, bfloat16, models with experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoConfig, Trainer

from alignment.config.model import AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.config.optim import OptimConfig, Schedule
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.rows import by_tokens, evenly, stream
from alignment.records.training import MetricsLog
from alignment.stages.dpo import run as dpo
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.kto import run as kto
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.reward import run as reward
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.sft import run as sft
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from alignment.training.micro_batches import (
    MicroBatches,
    _weigh,
    as_many_as_most,
    cut_alike,
    divided,
    shared_tokens,
)
from alignment.training.optimizer import RandomlyRoundedAdamW
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_spec
from tests.unit.models.conftest import PROMPTS, greedy, padded, twin

OPTIM = OptimConfig(lr=1e-3, batch_size=6, max_steps=3, schedule=Schedule.constant, warmup_ratio=0.0)
ADAPTER = AdapterConfig(kind=AdapterKind.lora, rank=4)
STAGES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sft": (SftConfig(optim=OPTIM, adapter=ADAPTER), sft.run),
    "sft packed": (SftConfig(optim=OPTIM, adapter=ADAPTER, packing=True, max_length=160), sft.run),
    "reward": (RewardConfig(optim=OPTIM, adapter=ADAPTER, eval_fraction=0.0), reward.run),
    "dpo": (DpoConfig(optim=OPTIM, adapter=ADAPTER), dpo.run),
    "kto": (KtoConfig(optim=OPTIM, adapter=ADAPTER), kto.run),
}
PAIRS = ("reward", "dpo", "kto")
NOT_EXACT = {"seconds"}
NOT_EXACT |= {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
"""What TRL averages over tokens inside a piece of pairs."""
TEXT = "the keys are with the caretaker in the hall and the shop is closed on Monday from now"


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([3, 3, 9, 1], 6, [(0, 2), (2, 3), (3, 4)]),
        ([3, 3], 100, [(0, 2)]),
        ([7], 1, [(0, 1)]),
        ([1, 1, 1], 1, [(0, 1), (1, 2), (2, 3)]),
        ([2, 2, 2, 2], 6, [(0, 2), (2, 4)]),
        ([5, 1, 1, 1, 1], 8, [(0, 1), (1, 5)]),
        ([9, 2, 2, 2], 4, [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_rows_are_cut_into_few_pieces_of_like_size(
    lengths: list[int], limit: int, expected: list[tuple[int, int]]
) -> None:
    assert [(piece.start, piece.stop) for piece in by_tokens(lengths, limit)] == expected


@pytest.mark.parametrize(
    ("lengths", "count", "expected"),
    [
        ([3, 3, 9, 1], 2, [(0, 2), (2, 4)]),
        ([3, 3, 9, 1], 3, [(0, 2), (2, 3), (3, 4)]),
        ([4, 4, 4, 4, 4], 2, [(0, 3), (3, 5)]),
        ([7], 2, [(0, 1)]),
        ([2, 2], 5, [(0, 1), (1, 2)]),
    ],
)
def test_rows_are_divided_evenly_among_so_many_pieces(
    lengths: list[int], count: int, expected: list[tuple[int, int]]
) -> None:
    assert [(piece.start, piece.stop) for piece in evenly(lengths, count)] == expected


def test_a_row_that_shares_counts_in_full_where_it_opens_a_piece() -> None:
    pieces = by_tokens([10, 10, 10], 13, behind=[10, 2, 2])
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 2), (2, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_pair_the_common_beginning_is_counted_once(side: str) -> None:
    """Where it is long enough to stand once in the stream, whichever side padding is on."""
    start = list(range(10, 30))
    pairs = [([*start, 5, 6], [*start, 7]), (start[:15], start[:15]), ([*start, 8], [*start, 8, 8, 8])]
    rows = [(chosen, []) for chosen, _ in pairs] + [(rejected, []) for _, rejected in pairs]
    batch = padded(rows, side=side)
    shared = shared_tokens(batch.input_ids, batch.attention_mask)
    assert shared.tolist() == [20, 0, 21]
    for (chosen, rejected), count in zip(pairs, shared.tolist(), strict=True):
        in_stream = stream([chosen, rejected], torch.device("cpu")).input_ids
        assert len(in_stream) == len(chosen) + len(rejected) - count


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (5, 3, [(0, 2), (2, 3), (3, 5)]),
        (1, 2, [(0, 1), (1, 1)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
    ],
)
def test_a_process_with_fewer_rows_takes_empty_pieces_last(
    rows: int, wanted: int, expected: list[tuple[int, int]]
) -> None:
    assert [(piece.start, piece.stop) for piece in divided([range(rows)], wanted)] == expected


@pytest.mark.parametrize("wanted", range(2, 10))
def test_cut_further_no_piece_grows_and_no_row_is_lost(wanted: int) -> None:
    """So that what fits in memory does so whatever the other processes have; and a process may have no row at all."""
    lengths = [1, 1, 1, 1, 1, 1, 100, 100]
    pieces = as_many_as_most([[], by_tokens(lengths, 106), [range(1)] * wanted], 1)
    assert [row for piece in pieces for row in piece] == list(range(8))
    assert len(pieces) == wanted
    assert max(sum(lengths[row] for row in piece) for piece in pieces) <= 106
    assert as_many_as_most([[], [range(1)] * wanted], 0) == [range(0)] * wanted


def test_pairs_are_cut_alike_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers put figures of single pairs together piece by piece, so pieces must hold equally many."""
    shares = [torch.tensor([60, 30, 30, 90]), torch.tensor([30, 30, 60, 20])]

    def maximum(values: torch.Tensor, op: Any) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        values.copy_(torch.stack(shares).amax(0))

    monkeypatch.setattr(torch.distributed, "all_reduce", maximum)
    accelerator: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    pieces = [cut_alike(share, 100, accelerator) for share in shares]
    assert pieces[0] == pieces[1] == [range(2), range(2, 3), range(3, 4)]
    assert [int(shares[rank][piece.start : piece.stop].sum()) for rank in range(2) for piece in pieces[rank]] == [
        *(90, 30, 90),
        *(60, 60, 20),
    ]
    assert cut_alike(shares[1], 100, SimpleNamespace(num_processes=1)) == by_tokens([30, 30, 60, 20], 100)


def test_an_empty_packed_piece_has_a_row_and_nothing_to_learn() -> None:
    batch = {name: torch.arange(6)[None] for name in ("input_ids", "labels", "position_ids")}
    part = MicroBatches._packed_micro_batch(batch, 6, 6, 4)
    assert part["input_ids"].tolist() == [[0, 1, 2, 3]]
    assert part["labels"].tolist() == [[-100] * 4]


def test_figures_of_pieces_count_by_their_share() -> None:
    metrics = {"margin": [9.0, 1.0, 4.0], "min_reward": [-1.0, -3.0, 2.0], "max_reward": [2.0, 5.0], "once": [7.0]}
    _weigh(metrics, {"margin": 1, "min_reward": 1}, lambda _: [0.75, 0.25])
    assert metrics == {"margin": [9.0, 1.75], "min_reward": [-1.0, -3.0], "max_reward": [5.0], "once": [7.0]}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL's own calls
@pytest.mark.parametrize("kind", STAGES)
def test_what_saves_memory_changes_neither_weights_nor_figures(tmp_path: Path, kind: str) -> None:
    config, run = STAGES[kind]
    weights, figures = [], []
    for limit, checkpointing in ((10_000, False), (150, True), (1, False)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        save_tiny_model(folder / "base")
        write_rows(folder / "data.jsonl", pairs=kind in PAIRS)
        stage_config = replace(
            config, optim=replace(OPTIM, micro_batch_tokens=limit, activation_checkpointing=checkpointing)
        )
        context = StageContext(spec=tiny_spec(folder, stage_config), rank=0, world_size=1)
        torch.manual_seed(0)
        run(stage_config, context)
        weights.append(trained_weights(context.content))
        figures.append(MetricsLog(context.content / "metrics.jsonl").last())
    for other, metrics in zip(weights[1:], figures[1:], strict=True):
        assert float((other - weights[0]).norm() / weights[0].norm()) < 1e-5
        assert metrics.keys() == figures[0].keys()
        for name in metrics.keys() - (NOT_EXACT if kind in PAIRS else {"seconds"}):
            assert metrics[name] == pytest.approx(figures[0][name], rel=1e-4, abs=1e-5), name


def test_figures_of_a_last_batch_that_is_not_full_are_gathered_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a pass over the rows, accelerate cuts what it gathers to so many entries as there were rows."""
    config, run = STAGES["sft"]
    cuts: list[bool] = []
    gather = Accelerator.gather_for_metrics

    def noted(self: Accelerator, *values: Any, **options: Any) -> Any:
        cuts.append(self.gradient_state.end_of_dataloader)
        return gather(self, *values, **options)

    monkeypatch.setattr(Accelerator, "gather_for_metrics", noted)
    save_tiny_model(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", pairs=False, rows=13)
    run(config, StageContext(spec=tiny_spec(tmp_path, config), rank=0, world_size=1))
    assert len(cuts) >= 3
    assert not any(cuts)


@pytest.mark.parametrize("kind", STAGES)
def test_without_masters_a_stage_keeps_and_saves_bfloat16_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config, run = STAGES[kind]
    steps: list[set[torch.dtype]] = []
    step = RandomlyRoundedAdamW.step

    def noted(self: RandomlyRoundedAdamW, closure: Any = None) -> None:
        steps.append({p.dtype for group in self.param_groups for p in group["params"] if p.dim() > 1 and len(p) > 1})
        step(self, closure)

    monkeypatch.setattr(RandomlyRoundedAdamW, "step", noted)
    save_tiny_model(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", pairs=kind in PAIRS)
    stage_config = replace(config, adapter=AdapterConfig(kind=AdapterKind.full, master_weights=False))
    model = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)
    context = StageContext(spec=tiny_spec(tmp_path, stage_config, model=model), rank=0, world_size=1)
    run(stage_config, context)
    assert steps == [{torch.bfloat16}] * 3
    (file,) = context.content.glob("model/*.safetensors")
    saved, before = load_file(file), load_file(next((tmp_path / "base").glob("*.safetensors")))
    name = "model.layers.0.mlp.up_proj.weight"
    assert saved[name].dtype == torch.bfloat16
    assert 1e-4 < float((saved[name].float() - before[name]).abs().mean()) < 1e-2


def test_weight_decay_leaves_the_magnitudes_of_dora_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin as the norms of the base's weights."""
    decays: dict[str, float] = {}
    create = Trainer.create_optimizer

    def noted(self: Trainer, *arguments: Any) -> torch.optim.Optimizer:
        optimizer = create(self, *arguments)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            decays.update(dict.fromkeys((names[id(own)] for own in group["params"]), group["weight_decay"]))
        return optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", noted)
    config, run = STAGES["sft"]
    adapter = replace(ADAPTER, kind=AdapterKind.dora)
    config = replace(config, adapter=adapter, optim=replace(OPTIM, weight_decay=0.5, max_steps=1))
    save_tiny_model(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", pairs=False)
    run(config, StageContext(spec=tiny_spec(tmp_path, config), rank=0, world_size=1))
    assert {decay for name, decay in decays.items() if "lora_magnitude_vector" in name} == {0.0}
    assert {decay for name, decay in decays.items() if ".lora_A." in name or ".lora_B." in name} == {0.5}


def write_rows(file: Path, *, pairs: bool, rows: int = 12) -> None:
    """Conversations or pairs of very different lengths."""
    words = TEXT.split()
    lines = []
    for number in range(1, rows + 1):
        question = {"role": "user", "content": " ".join(words[: number % 7 + 1])}
        answers = [" ".join(words[-1 - number % 5 :]), " ".join(words[number:])]
        if pairs:
            lines.append({"messages": [question], "chosen": answers[0], "rejected": answers[1] + "?"})
        else:
            lines.append({"messages": [question, {"role": "assistant", "content": answers[0]}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))


def trained_weights(content: Path) -> torch.Tensor:
    """All weights that a stage saved, as one vector."""
    (file,) = [*content.glob("adapters/*/adapter_model.safetensors"), *content.glob("model/*.safetensors")]
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())]).double()


FULL = AdapterConfig(kind=AdapterKind.full)
"""Trains the routers too."""
EXPERTS = pytest.mark.parametrize("architecture", ["mixtral", "granitemoe"])


def _trained_experts(
    folder: Path, kind: str, architecture: str, *, micro_batch_tokens: int, **changes: Any
) -> StageContext:
    """A stage that has _trained_experts all weights of such a model; ``changes`` replace settings of it."""
    config, run = STAGES[kind]
    folder.mkdir()
    save_tiny_model(folder / "base", architecture=architecture, router_aux_loss_coef=0.5, **changes)
    write_rows(folder / "data.jsonl", pairs=kind in PAIRS)
    config = replace(config, adapter=FULL, optim=replace(OPTIM, micro_batch_tokens=micro_batch_tokens))
    context = StageContext(spec=tiny_spec(folder, config), rank=0, world_size=1)
    torch.manual_seed(0)
    run(config, context)
    return context


@EXPERTS
@pytest.mark.parametrize("kind", ["sft", "sft packed", "dpo", "kto"])
def test_a_model_with_experts_learns_the_same_in_micro_batches_of_any_size(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    """The loss that balances experts would be another one in each micro-batch, so it is left out."""
    weights = []
    for limit in (10_000, 1):
        context = _trained_experts(tmp_path / str(limit), kind, architecture, micro_batch_tokens=limit)
        assert "aux_loss" not in MetricsLog(context.content / "metrics.jsonl").last()
        weights.append(trained_weights(context.content))
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-5


@EXPERTS
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_a_model_with_experts_keeps_its_coefficient(
    tmp_path: Path, kind: str, architecture: str, output_router_logits: bool
) -> None:
    changes = {"output_router_logits": output_router_logits}
    context = _trained_experts(tmp_path / "run", kind, architecture, micro_batch_tokens=10_000, **changes)
    saved = AutoConfig.from_pretrained(context.content / "model")
    assert (saved.router_aux_loss_coef, saved.output_router_logits) == (0.5, False)


@EXPERTS
def test_a_base_that_asks_for_an_auxiliary_loss_answers_as_without_it(tmp_path: Path, architecture: str) -> None:
    save_tiny_model(tmp_path / "base", architecture=architecture, output_router_logits=True)
    base = load_policy(Lineage(source="path:experts", base=tmp_path / "base", adapters=()), torch.float32)
    reference = twin(base)
    use_flat_attention(base)
    answers = generate(base, PROMPTS, max_new_tokens=6, end_ids=[], batch_size=2)
    assert answers == [greedy(reference, prompt, limit=6, ends=()) for prompt in PROMPTS]
