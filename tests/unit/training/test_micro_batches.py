"""What saves memory changes neither weights nor metrics: micro-batches, bfloat16, experts, precomputed references."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
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
from alignment.stages.sft.kind import SftConfig
from alignment.stages.shared import reference
from alignment.stages.shared.language_model import learn_conversations
from alignment.stages.shared.reference import OwnRows
from alignment.training.context import StageContext
from alignment.training.micro_batches import MicroBatches, _weigh, as_many_as_most, cut_alike, divided, shared_tokens
from alignment.training.optimizer import RandomlyRoundedAdamW
from tests.chained import PREFIX
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_spec
from tests.unit.models.conftest import PROMPTS, greedy, padded, twin

OPTIM = OptimConfig(lr=1e-3, batch_size=6, max_steps=3, schedule=Schedule.constant, warmup_ratio=0.0)
ADAPTER = AdapterConfig(kind=AdapterKind.lora, rank=4)
BARE = AdapterConfig(kind=AdapterKind.full, master_weights=False)
HALF = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)
STAGES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sft": (SftConfig(optim=OPTIM, adapter=ADAPTER), learn_conversations),
    "sft packed": (
        SftConfig(optim=OPTIM, adapter=ADAPTER, packing=True, max_length=160),
        learn_conversations,
    ),
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
    ("cut", "lengths", "limit", "expected"),
    [
        (by_tokens, [3, 3, 9, 1], 6, [(0, 2), (2, 3), (3, 4)]),
        (by_tokens, [7], 1, [(0, 1)]),
        (by_tokens, [2, 2, 2, 2], 6, [(0, 2), (2, 4)]),  # of like size
        (by_tokens, [9, 2, 2, 2], 4, [(0, 1), (1, 3), (3, 4)]),
        (evenly, [3, 3, 9, 1], 3, [(0, 2), (2, 3), (3, 4)]),
        (evenly, [4, 4, 4, 4, 4], 2, [(0, 3), (3, 5)]),
        (evenly, [2, 2], 5, [(0, 1), (1, 2)]),
        (lambda rows, wanted: divided([range(len(rows))], wanted), [1] * 5, 3, [(0, 2), (2, 3), (3, 5)]),
        (lambda rows, wanted: divided([range(len(rows))], wanted), [1] * 2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
    ],
)
def test_rows_are_cut_into_pieces(
    cut: Callable[[list[int], int], list[range]], lengths: list[int], limit: int, expected: list[tuple[int, int]]
) -> None:
    """By tokens, evenly, and further where another process has more; empty pieces come last."""
    assert [(piece.start, piece.stop) for piece in cut(lengths, limit)] == expected


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


@pytest.mark.parametrize("wanted", [3, 9])
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
@pytest.mark.parametrize(
    ("kind", "tokens"), [("sft", 80), ("sft packed", 80), ("reward", 150), ("dpo", 150), ("kto", 100)]
)
def test_what_saves_memory_changes_neither_weights_nor_figures(tmp_path: Path, kind: str, tokens: int) -> None:
    """Micro-batches of so many tokens have one row or two."""
    config, run = STAGES[kind]
    weights, figures = [], []
    for limit, checkpointing in ((10_000, False), (tokens, True)):
        optim = replace(OPTIM, micro_batch_tokens=limit, activation_checkpointing=checkpointing)
        stage_config = replace(config, optim=optim)
        context = ready(tmp_path / str(limit), stage_config, pairs=kind in PAIRS)
        torch.manual_seed(0)
        run(stage_config, context)
        weights.append(trained_weights(context.content))
        figures.append(MetricsLog(context.content / "metrics.jsonl").last())
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-5
    assert figures[1].keys() == figures[0].keys()
    for name in figures[0].keys() - (NOT_EXACT if kind in PAIRS else {"seconds"}):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-4, abs=1e-5), name


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
    run(config, ready(tmp_path, config, rows=13))
    assert len(cuts) >= 3
    assert not any(cuts)


@pytest.mark.parametrize("kind", ["sft", *PAIRS])
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
    stage_config = replace(config, adapter=BARE)
    context = ready(tmp_path, stage_config, pairs=kind in PAIRS, model=HALF)
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
    run(config, ready(tmp_path, config))
    assert {decay for name, decay in decays.items() if "lora_magnitude_vector" in name} == {0.0}
    assert {decay for name, decay in decays.items() if ".lora_A." in name or ".lora_B." in name} == {0.5}


def ready(folder: Path, config: Any, *, pairs: bool = False, rows: int = 12, model: Any = None, **base: Any) -> Any:
    folder.mkdir(exist_ok=True)
    save_tiny_model(folder / "base", **base)
    write_rows(folder / "data.jsonl", pairs=pairs, rows=rows)
    spec = tiny_spec(folder, config, **({} if model is None else {"model": model}))
    return StageContext(spec=spec, rank=0, world_size=1)


def write_rows(file: Path, *, pairs: bool, rows: int = 12) -> None:
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
    (file,) = [*content.glob("adapters/*/adapter_model.safetensors"), *content.glob("model/*.safetensors")]
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())]).double()


FULL = AdapterConfig(kind=AdapterKind.full)


@pytest.mark.parametrize(
    ("kind", "architecture", "asks"),
    [
        ("sft packed", "mixtral", True),
        ("sft", "granitemoe", True),
        ("dpo", "mixtral", False),
        ("kto", "granitemoe", True),
    ],
)
def test_a_model_with_experts_learns_the_same_in_micro_batches_of_any_size(
    tmp_path: Path, kind: str, architecture: str, asks: bool
) -> None:
    """The loss that balances experts would be another one in each micro-batch, so it is left out; its coefficient
    stays. Full training trains the routers too."""
    config, run = STAGES[kind]
    weights = []
    for limit in (10_000, 1):
        own = replace(config, adapter=FULL, optim=replace(OPTIM, micro_batch_tokens=limit))
        base = {"architecture": architecture, "router_aux_loss_coef": 0.5, "output_router_logits": asks}
        context = ready(tmp_path / str(limit), own, pairs=kind in PAIRS, **base)
        torch.manual_seed(0)
        run(own, context)
        assert "aux_loss" not in MetricsLog(context.content / "metrics.jsonl").last()
        saved = AutoConfig.from_pretrained(context.content / "model")
        assert (saved.router_aux_loss_coef, saved.output_router_logits) == (0.5, False)
        weights.append(trained_weights(context.content))
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-5


@pytest.mark.parametrize("architecture", ["mixtral", "granitemoe"])
def test_a_base_that_asks_for_an_auxiliary_loss_answers_as_without_it(tmp_path: Path, architecture: str) -> None:
    save_tiny_model(tmp_path / "base", architecture=architecture, output_router_logits=True)
    base = load_policy(Lineage(source="path:experts", base=tmp_path / "base", adapters=()), torch.float32)
    reference = twin(base)
    use_flat_attention(base)
    answers = generate(base, PROMPTS, max_new_tokens=6, end_ids=[], batch_size=2)
    assert answers == [greedy(reference, prompt, limit=6, ends=()) for prompt in PROMPTS]


def _train(folder: Path, config: DpoConfig, *, below: float = 0.69, **changes: Any) -> torch.Tensor:
    context = StageContext(spec=tiny_spec(folder, config, **changes), rank=0, world_size=1)
    torch.manual_seed(0)
    dpo.run(config, context)
    assert MetricsLog(context.content / "metrics.jsonl").last()["loss"] < below
    weights = trained_weights(context.content)
    for part in (context.content, context.checkpoints):
        shutil.rmtree(part)
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", pairs=True)
    return tmp_path


@pytest.mark.parametrize("adapter", [ADAPTER, FULL], ids=["lora", "full"])
def test_live_and_precomputed_references_train_the_same_policy(folder: Path, adapter: AdapterConfig) -> None:
    config = DpoConfig(optim=OPTIM, adapter=adapter)
    live = _train(folder, config)
    precomputed = _train(folder, replace(config, precompute_reference=True))
    assert float((live - precomputed).norm() / live.norm()) < 1e-4


@pytest.mark.parametrize("adapter", [ADAPTER, FULL, BARE], ids=["lora", "full", "bare"])
def test_a_live_reference_computes_in_the_format_of_the_policy(folder: Path, adapter: AdapterConfig) -> None:
    """Else the first loss would be ln 2 but for the rounding of bfloat16, and every later one would carry it on."""
    config = DpoConfig(optim=replace(OPTIM, max_steps=1), adapter=adapter)
    context = StageContext(spec=tiny_spec(folder, config, model=HALF), rank=0, world_size=1)
    dpo.run(config, context)
    first = MetricsLog(context.content / "metrics.jsonl").rows()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_is_computed_once_and_again_when_something_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    sums = OwnRows.sums

    def noted(self: OwnRows, answer: str, *, micro_batches: int | None = None) -> torch.Tensor:
        if micro_batches is None:
            computed.append(len(self.rows))
        return sums(self, answer, micro_batches=micro_batches)

    monkeypatch.setattr(OwnRows, "sums", noted)
    config = DpoConfig(optim=OPTIM, adapter=ADAPTER, precompute_reference=True)
    _train(folder, config)
    assert computed == [12, 12]
    _train(folder, replace(config, beta=0.5))
    assert computed == [12, 12]
    write_rows(folder / "data.jsonl", pairs=True, rows=10)
    _train(folder, config)
    assert computed == [12, 12, 10, 10]
    save_tiny_model(folder / "base", seed=1)
    _train(folder, config)
    assert computed == [12, 12, 10, 10, 10, 10]
    monkeypatch.setattr(reference, "_device_name", lambda device: f"not {device.type}")
    _train(folder, config)
    assert computed == [12, 12, 10, 10, 10, 10, 10, 10]


@pytest.mark.parametrize("damage", ["cut", "too short", "of another policy"])
def test_a_reference_that_is_damaged_or_another_policys_is_computed_anew_and_put_right(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16, another processor's numbers differ, too."""
    config = DpoConfig(optim=OPTIM, adapter=ADAPTER, precompute_reference=True)
    weights = _train(folder, config)
    (file,) = folder.rglob("reference-*.safetensors")
    content, whole = file.read_bytes(), load_file(file)
    if damage == "cut":
        file.write_bytes(content[:1])
    elif damage == "too short":
        save_file({"chosen": torch.zeros(1), "rejected": torch.zeros(1)}, file)
    else:
        save_file({**whole, "rejected": whole["rejected"] - 0.3}, file)
    assert torch.equal(_train(folder, config), weights)
    assert file.read_bytes() == content
    expected = {"cut": (True, True), "too short": (False, False), "of another policy": (False, True)}[damage]
    assert ("is damaged" in caplog.text, "computed again" in caplog.text) == expected


def test_each_format_of_weights_and_length_of_a_prefix_has_a_reference_of_its_own(folder: Path) -> None:
    """Frozen and bare weights are both bfloat16. A new prefix changes the policy at once, because its keys take a share
    of the attention."""
    optim = replace(OPTIM, max_steps=1)
    for adapter in (ADAPTER, FULL, BARE):
        _train(folder, DpoConfig(optim=optim, adapter=adapter, precompute_reference=True), below=0.7, model=HALF)
    for adapter in (PREFIX, replace(PREFIX, virtual_tokens=8)):
        _train(folder, DpoConfig(optim=optim, adapter=adapter, precompute_reference=True), below=0.7)
    assert len(list((folder / "artifacts/cache").glob("reference-*"))) == 4
