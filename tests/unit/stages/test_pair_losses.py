"""DPO's losses and their gradients as the trainer computes them, against their papers, and its reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from trl.trainer import dpo_trainer

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.model import CONTINUE, AdapterConfig, Chain, Dtype
from alignment.core.artifacts import read_manifest
from alignment.models.assembly.adapters import at_start
from alignment.stages.dpo import run as dpo
from alignment.stages.dpo import trainer
from alignment.stages.dpo.kind import DpoConfig, DpoLoss
from alignment.stages.registry import doubts
from alignment.stages.shared.preference_pairs import read_pairs
from alignment.stages.shared.reference import OwnRows, Reference
from alignment.stages.shared.result import initial_policy
from alignment.training.context import StageContext
from tests.chained import FULL, LORA, Chained, config_of
from tests.oracles import preferences as oracle
from tests.oracles.close import close
from tests.pairs import TokenizedPair, as_pairs, as_table
from tests.tiny import liven, tiny_model

BETA = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    settings: Mapping[str, Any]
    paper: Callable[[oracle.Pair], oracle.Loss]
    at_start: float | None = None

    @property
    def needs_reference(self) -> bool:
        return DpoLoss(self.settings["loss"]).needs_reference


def case(paper: Callable[..., oracle.Loss], loss: str, at_start: float | None = None, **settings: float) -> Case:
    return Case(settings={"loss": DpoLoss(loss), **settings}, paper=partial(paper, **settings), at_start=at_start)


def and_nll(plain: Case, weight: float) -> Case:
    def paper(pair: oracle.Pair) -> oracle.Loss:
        return oracle.with_nll(plain.paper(pair), pair, nll_weight=weight)

    return Case(settings={**plain.settings, "nll_weight": weight}, paper=paper)


LN2 = math.log(2.0)
CASES = {
    "sigmoid": case(oracle.dpo, "sigmoid", LN2, beta=BETA),
    "sigmoid_norm": case(oracle.normalised_dpo, "sigmoid_norm", LN2, beta=BETA),
    "hinge": case(oracle.hinge, "hinge", 1.0, beta=BETA),
    "ipo": case(oracle.ipo, "ipo", 1.0 / (4.0 * BETA**2), beta=BETA),
    "robust": case(oracle.robust, "robust", LN2, beta=BETA, label_smoothing=0.2),
    "apo_zero": case(oracle.apo_zero, "apo_zero", 1.0, beta=BETA),
    "apo_down": case(oracle.apo_down, "apo_down", 1.0, beta=BETA),
    "conservative": case(oracle.dpo, "sigmoid", LN2, beta=BETA, label_smoothing=0.2),
    "conservative_norm": case(oracle.normalised_dpo, "sigmoid_norm", LN2, beta=BETA, label_smoothing=0.2),
    "margin": case(oracle.dpo, "sigmoid", beta=BETA, margin=0.6),
    "simpo": case(oracle.simpo, "simpo", beta=2.0, target_margin=0.9),
    "orpo": case(oracle.orpo, "orpo", odds_weight=0.4),
}
CASES |= {f"{name}+nll": and_nll(CASES[name], 0.8) for name in ("sigmoid", "ipo", "apo_down", "margin", "simpo")}
PRECOMPUTED = ("sigmoid", "apo_zero", "conservative", "margin+nll")


def logprobs(logits: torch.Tensor, ids: list[int], start: int) -> list[float]:
    """log p of each token from ``start`` on, from logits ``[tokens, vocabulary]``."""
    return [float(logits[at - 1].double().log_softmax(-1)[ids[at]]) for at in range(start, len(ids))]


ANSWERS = [
    ("Is it open?", "No, the shop is closed on Monday.", "Yes."),
    ("Who has the keys?", "The caretaker.", "They are in the hall, says the note."),
    ("Where?", "In the hall.", "In the shop on Monday."),
    ("What does it say?", "That the keys are with the caretaker.", "That it is closed."),
    ("When?", "On Monday.", "The note says now."),
    ("Is the hall closed?", "The text says only that the shop is.", "It is, on Monday, and so are the keys."),
]


def scored_rows(folder: Path) -> Path:
    file = folder / "scored.jsonl"
    names = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
    rows = [(*answers, 0.5 * number + 1, 0.25) for number, answers in enumerate(ANSWERS)]
    write_rows(file, [dict(zip(names, row, strict=True)) for row in rows])
    return file


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def moved(model: torch.nn.Module) -> None:
    """Moves the policy by about a nat an answer, so that no loss is saturated."""
    liven(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data *= 0.5


def about_to_learn(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[int] = (0, 3), adapter: AdapterConfig = LORA
) -> tuple[dpo.PairTrainer, list[dict[str, Any]]]:
    chained = Chained(folder)
    config = config_of("dpo", adapter, **settings)
    assert isinstance(config, DpoConfig)
    spec = replace(chained.spec("dpo", adapter, config=config), data_path=scored_rows(folder))
    context = StageContext(spec=spec, rank=0, world_size=1)
    start, tokenizer = initial_policy(context)
    pairs, _ = read_pairs(config, context, tokenizer)
    pairs = pairs.select(rows)
    trainer = dpo._trainer(config, context, start, tokenizer, pairs)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = len(rows)
    return trainer, list(pairs)


def in_numbers(trainer: dpo.PairTrainer, row: Mapping[str, Any]) -> oracle.Pair:
    answers = {}
    base = trainer.model.get_base_model()
    for side in ("chosen", "rejected"):
        ids = torch.tensor([row["prompt"] + row[side]], device=trainer.args.device)
        with torch.no_grad():
            answers[side] = logprobs(base(ids).logits[0], ids[0].tolist(), len(row["prompt"]))
            with at_start(trainer.model) as start:
                answers[f"reference_{side}"] = logprobs(start(ids).logits[0], ids[0].tolist(), len(row["prompt"]))
    return oracle.Pair(**answers, score_difference=row.get("margin", 0.0))


def batch_of(trainer: dpo.PairTrainer) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch


def in_order_of(batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_ids = {tuple(row["prompt"] + row["chosen"]): row for row in rows}
    chosen = zip(batch["input_ids"][: len(rows)], batch["attention_mask"][: len(rows)], strict=True)
    return [by_ids[tuple(ids[real.bool()].tolist())] for ids, real in chosen]


def loss_and_gradient(trainer: dpo.PairTrainer, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The trainer's loss, and its gradient with respect to the ``[2 * pairs, tokens]`` log-probabilities."""
    outputs = []

    def recorded(**kwargs: Any) -> Any:
        outputs.append(trainer.model(**kwargs))
        outputs[-1].log_probs.retain_grad()
        return outputs[-1]

    loss = trainer.compute_loss(recorded, batch)
    loss.backward()
    return float(loss.detach()), outputs[0].log_probs.grad


def test_every_loss_has_a_case() -> None:
    assert {case.settings["loss"] for case in CASES.values()} == set(DpoLoss)


@pytest.mark.parametrize(
    ("name", "precomputed"), [*((name, False) for name in CASES), *((name, True) for name in PRECOMPUTED)]
)
def test_a_loss_is_that_of_its_paper_before_and_after_the_policy_moved(
    tmp_path: Path, name: str, precomputed: bool
) -> None:
    tried = CASES[name]
    trainer, rows = about_to_learn(tmp_path, {**tried.settings, "precompute_reference": precomputed})
    first = dpo.check_start(trainer)
    batch = batch_of(trainer)
    rows = in_order_of(batch, rows)
    with torch.no_grad():
        at_step_0 = float(trainer.compute_loss(trainer.model, batch))
    config = config_of("dpo", LORA, **tried.settings)
    assert isinstance(config, DpoConfig)
    close(at_step_0, mean(tried.paper(in_numbers(trainer, row)).value for row in rows), rtol=1e-4)
    close(dpo.start_loss(config, first.start), at_step_0, rtol=1e-4)
    if tried.at_start is not None:
        close(at_step_0, tried.at_start, rtol=1e-4)

    moved(trainer.model)
    pairs = [in_numbers(trainer, row) for row in rows]
    got, gradient = loss_and_gradient(trainer, batch)
    papers = [tried.paper(pair) for pair in pairs]
    assert abs(got - at_step_0) > 0.01
    close(got, mean(paper.value for paper in papers), rtol=1e-4)
    mask = batch["completion_mask"][:, 1:].bool()
    by_row = [paper.by_chosen for paper in papers] + [paper.by_rejected for paper in papers]
    expected = torch.tensor(by_row, dtype=torch.float64)[:, None].expand(mask.shape)[mask.cpu()] / len(rows)
    close(gradient[mask], expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "adapter"), [("simpo", LORA), ("orpo", FULL), ("conservative", LORA)])
def test_a_reference_that_is_not_needed_or_was_computed_before_is_not_computed(
    tmp_path: Path, name: str, adapter: AdapterConfig
) -> None:
    """A loss without a reference has none anywhere."""
    settings = {**CASES[name].settings, "precompute_reference": CASES[name].needs_reference}
    trainer, _ = about_to_learn(tmp_path, settings, adapter=adapter)
    if not CASES[name].needs_reference:
        assert trainer.ref_model is None
        assert not any("ref" in weight.split(".") for weight, _ in trainer.model.named_parameters())
        dpo.check_start(trainer)
    calls: list[Any] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_answers_are_ranked_by_what_the_loss_compares(tmp_path: Path, name: str) -> None:
    """SimPO compares means over tokens, ORPO odds; sums would rank many pairs by their lengths."""
    trainer, rows = about_to_learn(tmp_path, CASES[name].settings, rows=(0, 1, 2, 3, 4, 5))
    moved(trainer.model)
    trainer.compute_loss(trainer.model, batch_of(trainer))
    chosen, rejected = zip(*(ranked_by(name, in_numbers(trainer, row)) for row in rows), strict=True)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    close(metrics["rewards/chosen"], mean(chosen), rtol=1e-4)
    close(metrics["rewards/rejected"], mean(rejected), rtol=1e-4)
    close(metrics["rewards/margins"], mean(chosen) - mean(rejected), rtol=1e-4, atol=1e-5)
    close(metrics["rewards/accuracies"], mean(float(a > b) for a, b in zip(chosen, rejected, strict=True)))


def ranked_by(name: str, pair: oracle.Pair) -> tuple[float, float]:
    means = (sum(answer) / len(answer) for answer in (pair.chosen, pair.rejected))
    if name == "simpo":
        return tuple(2.0 * mean_logprob for mean_logprob in means)  # type: ignore[return-value]
    return tuple(math.log(math.exp(m) / (1.0 - math.exp(m))) for m in means)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "adapter"), [("margin+nll", LORA), ("orpo", FULL)])
def test_a_stage_with_a_loss_of_ours_is_validated_and_resumed(
    tmp_path: Path, name: str, adapter: AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first step, it ends like one that was not."""
    settings = {**CASES[name].settings, "validation": ValidationConfig(share=0.3, every=1)}

    def run_on(folder: Path) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        config = config_of("dpo", adapter, **settings)
        config = replace(config, optim=replace(config.optim, batch_size=2, epochs=2))  # type: ignore[attr-defined]
        return run_metrics(Chained(folder), "dpo", adapter, config=config, data_path=scored_rows(folder))

    straight = run_on(tmp_path / "straight")
    with monkeypatch.context() as patched:
        patched.setattr(trainer.PairTrainer, "training_step", failing_after(1))
        with pytest.raises(KeyboardInterrupt):
            run_on(tmp_path / "resumed")
    resumed = run_on(tmp_path / "resumed")
    assert straight["validation/loss"] > 0.0
    assert resumed.keys() == straight.keys()
    close(list(resumed.values()), list(straight.values()), rtol=1e-4, atol=1e-5)


def run_metrics(chained: Chained, kind: str, adapter: AdapterConfig, **changes: Any) -> dict[str, float]:
    chained.run(kind, adapter, **changes)
    manifest = read_manifest(chained.inputs[kind].path)
    return dict(manifest.metrics)


def failing_after(steps: int) -> Any:
    whole, done = trainer.PairTrainer.training_step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return whole(self, *args, **kwargs)

    return step


def test_changes_are_those_of_the_first_batch_under_the_policy_of_now(tmp_path: Path) -> None:
    trainer, rows = about_to_learn(tmp_path, CASES["sigmoid"].settings)
    first = dpo.check_start(trainer)
    moved(trainer.model)
    trainer.model_wrapped = trainer.model
    pairs, changes = [in_numbers(trainer, row) for row in rows], first.changes()
    of_chosen = mean(sum(pair.chosen) - sum(pair.reference_chosen) for pair in pairs)
    of_rejected = mean(sum(pair.rejected) - sum(pair.reference_rejected) for pair in pairs)
    close(changes["logps/chosen_change"], of_chosen, rtol=1e-4)
    close(changes["logps/rejected_change"], of_rejected, rtol=1e-4)


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE], ids=lambda chain: chain.value)
def test_a_precomputed_reference_is_what_the_starting_policy_says_of_every_row(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of a stage that trained with dropout arrive in training mode. The weights are not read once more."""

    def must_not_hash(*_: object) -> str:
        raise AssertionError("all weights would be read once more")

    monkeypatch.setattr(dpo_trainer, "hash_module", must_not_hash)
    chained = Chained(tmp_path)
    chained.run("sft", AdapterConfig(rank=4, dropout=0.5))
    config = config_of("dpo", AdapterConfig(rank=4, chain=chain), precompute_reference=True)
    assert isinstance(config, DpoConfig)
    context = StageContext(spec=chained.spec("dpo", config.adapter, init="sft", config=config), rank=0, world_size=1)
    policy = chained.policy("sft")
    start, tokenizer = initial_policy(context)
    pairs, _ = read_pairs(config, context, tokenizer)
    trainer = dpo._trainer(config, context, start, tokenizer, pairs)
    assert dpo_trainer.hash_module is must_not_hash, "it is put back"
    dpo.check_start(trainer)
    for side in ("chosen", "rejected"):
        plain = []
        for pair in as_pairs(pairs):
            ids = [*pair.prompt, *getattr(pair, side)]
            with torch.no_grad():
                plain.append(sum(logprobs(policy(torch.tensor([ids])).logits[0], ids, len(pair.prompt))))
        close(trainer.train_dataset[f"ref_{side}_logps"], plain, rtol=1e-4)


FIRST_WORDS = [("Monday?", "Now", "Soon"), ("hall?", "Up", "Down"), ("note?", "In", "Out"), ("shop?", "Yes", "No")]


def long_dpo(folder: Path, **settings: Any) -> dict[str, float]:
    """The metrics of DPO with a high learning rate, from a policy that gives either answer half of the time.

    The answers to a prompt share all but their first words. So the policy cannot gain much by a chosen answer, and what
    lowers the rejected one lowers both.
    """
    chained, ending = Chained(folder), "the keys are with the caretaker in the hall."
    pairs = [(prompt, f"{chosen} {ending}", f"{rejected} {ending}") for prompt, chosen, rejected in FIRST_WORDS]
    both = [{"prompt": prompt, "completion": answer} for prompt, *answers in pairs for answer in answers]
    write_rows(folder / "sft.jsonl", both)
    write_rows(folder / "dpo.jsonl", ({"prompt": p, "chosen": chosen, "rejected": r} for p, chosen, r in pairs))

    def run_long(kind: str, epochs: int, init: str, **changes: Any) -> dict[str, float]:
        config: Any = config_of(kind, FULL, data=DataConfig(source="path:rows"), **changes)
        config = replace(config, optim=replace(config.optim, epochs=epochs))
        return run_metrics(chained, kind, FULL, init=init, config=config, data_path=folder / f"{kind}.jsonl")

    assert run_long("sft", 40, "base")["loss"] < 0.2, "both are likely"
    return run_long("dpo", 16, "sft", **settings)


def test_dpo_makes_both_answers_unlikely_and_says_so_and_nll_weight_makes_the_chosen_likely(tmp_path: Path) -> None:
    plain, with_nll = long_dpo(tmp_path / "plain"), long_dpo(tmp_path / "nll", nll_weight=1.0)
    assert plain["logps/chosen_change"] < -LN2
    assert plain["logps/rejected_change"] < -LN2
    assert with_nll["logps/chosen_change"] > 0.0
    (doubt,) = doubts("dpo", plain)
    assert "less than half as likely" in doubt
    assert "nll_weight=1" in doubt
    assert doubts("dpo", with_nll) == []


def test_a_reference_stands_beside_its_own_pair_where_rows_are_drawn() -> None:
    pairs = as_table(TokenizedPair(prompt=[n], chosen=[n, 2], rejected=[n, 3]) for n in range(6)).select([4, 0, 2])
    logprobs = {"chosen": torch.tensor([-4.0, 0.0, -2.0]), "rejected": torch.tensor([4.5, 0.5, 2.5])}
    own = OwnRows(policy=tiny_model(), rows=pairs, dtype=Dtype.float32, tokens=64, rank=0, world_size=1)
    reference = Reference(logprobs=logprobs, file=Path("x"), own=own)
    assert list(dpo._dataset(pairs, reference)) == [
        {
            "prompt_ids": [n], "chosen_ids": [n, 2], "rejected_ids": [n, 3],
            "ref_chosen_logps": -float(n), "ref_rejected_logps": n + 0.5,
        }
        for n in (4, 0, 2)
    ]  # fmt: skip
