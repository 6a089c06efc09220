"""PPO and the methods without a critic while an engine samples: a server that computes with transformers and PEFT."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from alignment.config.launch import Engine, RolloutSamplingConfig
from alignment.config.model import AdapterConfig, Critic
from alignment.config.scoring import GuardConfig
from alignment.core.errors import StageError
from alignment.models.assembly.engine_weights import write_base
from alignment.models.assembly.load import Lineage
from alignment.stages.ppo.config import Advantage, KlConfig, PpoConfig, PpoOptimConfig
from alignment.stages.ppo.engine import EngineGap
from alignment.stages.ppo.step_metrics import UpdateMetrics
from tests.engine_server import COMPLETIONS, FakeEngine, Planted, engine_server
from tests.oracles import critic_free
from tests.oracles import importance as oracle
from tests.oracles.close import close
from tests.proofs.common import PpoStage, TokenRewards, each, ppo_stage
from tests.tiny import BASE_SOURCE, tiny_model
from tests.unit.training.ppo_bench import END, FULL, LORA, PROMPTS, Plain, Taken, taken

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GROUP, POWER, CAP, CLIP, LONGEST = 4, 1.5, 1.2, 0.05, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "base"
    tiny_model(vocab_size=24).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def untied(base: Path) -> Path:
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    return write_base(start, FULL, torch.float32, base.parent / "untied")


def score(prompt: Any, answer: Any) -> float:
    return sum(answer) / 16 - 0.8 * len(answer)


@contextmanager
def staged(
    folder: Path, base: Path, served: Path | None = None, *, planted: Planted | None = None, **changes: Any
) -> Iterator[tuple[FakeEngine, PpoStage]]:
    with engine_server(served or base, planted=planted or Planted()) as engine:
        sampling = {"engine": Engine.vllm, "url": engine.url, "retries": 0, "timeout": 20.0}
        sampling |= changes.pop("sampling", {})
        settings: dict[str, Any] = {
            "reward": None,
            "adapter": LORA,
            "updates": 3,
            "ppo_epochs": 2,
            "max_new_tokens": LONGEST,
            "kl": KlConfig(coefficient=0.1),
            "missing_eos_penalty": 0.0,
            "sampling": RolloutSamplingConfig(**sampling),
            "optim": PpoOptimConfig(lr=3e-3, batch_size=len(PROMPTS), micro_batch_tokens=1000),
        }
        config = PpoConfig(**(settings | changes))
        torch.manual_seed(0)
        stage = ppo_stage(
            folder,
            config,
            base=base,
            prompts=PROMPTS,
            end_id=END,
            rewards=TokenRewards(rule=each(score)),
            held_out_scorer=TokenRewards(rule=each(score)) if config.guard.every else None,
            seed=0,
        )
        with stage.resources:
            yield engine, stage


def models_asked(engine: FakeEngine) -> list[str]:
    names = [body["model"].rpartition("-")[0] or body["model"] for body in engine.paths(COMPLETIONS)]
    return list(dict.fromkeys(names))


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [(LORA, {}), (FULL, {"advantage": Advantage.rloo, "critic": Critic.none, "completions_per_prompt": 2})],
    ids=["lora-gae", "full-rloo"],
)
def test_on_policy_importance_is_one_and_the_first_ratio_too(
    tmp_path: Path, base: Path, untied: Path, adapter: AdapterConfig, changes: dict[str, Any]
) -> None:
    served = untied if adapter is FULL else base
    with staged(tmp_path, base, served, adapter=adapter, sampling={"importance_cap": 2.0}, **changes) as (_, stage):
        lines = stage.train()
    assert len(lines) == 3
    for line in lines:
        assert line["engine/gap"] < 1e-5
        assert line["engine/gap_max"] < 1e-4
        assert line["engine/importance"] == pytest.approx(1.0, abs=1e-5)
        assert line["engine/capped"] == line["engine/beyond"] == line["engine/staleness"] == 0.0
        assert line["policy/approxkl_first"] < 1e-10
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[2]["objective/kl"] > 1e-4, "the policy should move"


def test_an_engine_that_is_off_changes_neither_the_ratio_nor_the_kl_at_step_0(tmp_path: Path, base: Path) -> None:
    with staged(tmp_path, base, planted=Planted(power=POWER), sampling={"importance_cap": 2.0}) as (_, stage):
        line = stage.train()[0]
    assert line["engine/gap"] > 0.05
    assert 0.0 < line["engine/beyond"] <= 1.0
    assert line["policy/approxkl_first"] < 1e-10
    assert abs(line["objective/kl"]) < 1e-5
    assert line["engine/importance"] != pytest.approx(1.0, abs=1e-3)


def expected_gradients(trace: Taken, number: int, method: str, *, cap: float | None) -> dict[str, Tensor]:
    rows = trace.rows[1]
    old, new = (Plain(trace.before[at]) for at in (2, number))
    with torch.no_grad():
        before = old.distributions(rows)
        start = Plain(trace.before[0]).logprobs(rows)
    answers = [answer for _, answer in rows]
    olds, drawn = (
        [(power * each_).log_softmax(-1)[range(len(a)), a].tolist() for each_, a in zip(before, answers, strict=True)]
        for power in (1.0, POWER)
    )
    costs = [sum(now) - float(then.sum()) for now, then in zip(olds, start, strict=True)]
    rewards = [score(*row) - 0.1 * cost for row, cost in zip(rows, costs, strict=True)]
    given = critic_free.advantages(method, rewards, GROUP)
    if cap is not None:
        weights = [w for o, d in zip(olds, drawn, strict=True) for w in oracle.weights(o, d, cap=cap, whole=False)]
        assert 0.05 < sum(w >= cap for w in weights) / len(weights) < 0.95, "the cap should bind somewhere"
    loss = oracle.policy_loss(
        method,
        new.logprobs(rows),
        olds,
        olds if cap is None else drawn,
        given,
        cap=cap or 1.0,
        low=CLIP,
        high=CLIP,
        longest=LONGEST,
        exp=torch.exp,
    )
    loss.backward()
    return {"policy." + name: p.grad for name, p in new.policy.named_parameters()}


@pytest.mark.parametrize(("method", "cap"), [("rloo", CAP), ("grpo", None), ("dr_grpo", CAP)])
def test_a_step_on_an_engines_answers_is_what_the_paper_says(
    tmp_path: Path, base: Path, untied: Path, monkeypatch: pytest.MonkeyPatch, method: str, cap: float | None
) -> None:
    """The last step of the second update: policy, old policy and what sampled are three."""
    changes: dict[str, Any] = {
        "adapter": FULL,
        "advantage": Advantage(method),
        "critic": Critic.none,
        "completions_per_prompt": GROUP,
        "updates": 2,
        "clip": CLIP,
        "sampling": {"importance_cap": cap},
        "optim": PpoOptimConfig(
            lr=3e-3, batch_size=len(PROMPTS) * GROUP, micro_batch_tokens=60, max_grad_norm=1e9, adam_eps=1e-2
        ),
    }
    with staged(tmp_path, base, untied, planted=Planted(power=POWER), **changes) as (_, stage):
        trace = taken(stage, monkeypatch)  # type: ignore[arg-type]
    for number in (2, 3):
        for name, gradient in expected_gradients(trace, number, method, cap=cap).items():
            actual = trace.gradients[number][name]
            assert float((actual - gradient).norm() / gradient.norm()) < 1e-3, name


def test_weights_follow_after_each_update_and_old_ones_are_removed(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tmp_path, base) as (engine, stage):
        folder = stage.trainer.rollouts.engine.session.folder  # type: ignore[attr-defined]
        on_disk: list[set[str]] = []
        engine.failing = lambda path, number: (
            on_disk.append({p.name for p in folder.glob("policy-*")}) if path == COMPLETIONS else None
        )
        stage.train()
        changes = [(path, body["lora_name"]) for path, body in engine.calls if path in (LOAD, UNLOAD)]
        versions = [name.rpartition("-")[0] for path, name in changes if path == LOAD]
        assert models_asked(engine) == versions == ["policy-0", "policy-1", "policy-2"]
        assert [path for path, _ in changes] == [LOAD, LOAD, UNLOAD, LOAD, UNLOAD, UNLOAD], "the last one at the end"
        assert len({name.rpartition("-")[2] for _, name in changes}) == 1
        assert engine.names == ["base"]
    assert [len(names) for names in on_disk] == [1] * len(on_disk), "one version is on the disk while it answers"
    assert not folder.exists()


def test_an_engine_that_stays_behind_is_noticed(tmp_path: Path, base: Path) -> None:
    optim = PpoOptimConfig(lr=1e-2, batch_size=len(PROMPTS), micro_batch_tokens=1000)
    with staged(tmp_path, base, optim=optim, temperature=0.8, planted=Planted(behind=True)) as (_, stage):
        with pytest.raises(StageError, match="so it has other weights"):
            stage.train()
        assert stage.trainer.updates_done == 1, "the first update has the weights of the start"


def test_one_call_for_each_prompt_and_seeds_that_a_second_run_repeats(tmp_path: Path, base: Path) -> None:
    changes: dict[str, Any] = {
        "advantage": Advantage.rloo,
        "critic": Critic.none,
        "completions_per_prompt": GROUP,
        "updates": 1,
        "optim": PpoOptimConfig(lr=1e-3, batch_size=len(PROMPTS) * GROUP, micro_batch_tokens=1000),
    }
    seeds = []
    for name in ("first", "second"):
        with staged(tmp_path / name, base, **changes) as (engine, stage):
            stage.train()
            bodies = engine.paths(COMPLETIONS)
        seeds.append(sorted((body["prompt"], body["seed"]) for body in bodies))
    assert seeds[0] == seeds[1]
    assert [prompt for prompt, _ in seeds[0]] == sorted(PROMPTS)
    assert [body["n"] for body in bodies] == [GROUP] * len(PROMPTS)
    assert len({body["seed"] for body in bodies}) == len(PROMPTS)
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(LONGEST, 1.0)}
    assert {tuple(body["stop_token_ids"]) for body in bodies} == {(END,)}


def test_full_training_writes_the_head_apart(tmp_path: Path, base: Path, untied: Path) -> None:
    """The base's head is its embedding matrix; a server that got only one of them would keep the other."""
    assert AutoConfig.from_pretrained(str(base)).tie_word_embeddings
    assert not AutoConfig.from_pretrained(str(untied)).tie_word_embeddings
    with staged(tmp_path, base, untied, adapter=FULL) as (engine, stage):
        heads: list[Tensor] = []
        folder = stage.trainer.rollouts.engine.session.folder  # type: ignore[attr-defined]

        def note(path: str, number: int) -> None:
            if path == "/collective_rpc":
                files = folder.glob("policy-*/model.safetensors")
                weights = load_file(max(files, key=lambda file: int(file.parent.name.partition("-")[2])))
                assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
                heads.append(weights["lm_head.weight"])

        engine.failing = note
        lines = stage.train()
    assert len(heads) == 3
    assert not torch.equal(heads[0], heads[2])
    assert max(line["engine/gap"] for line in lines) < 1e-5


def test_answers_sampled_ahead_are_those_of_the_policy_before_and_are_corrected(tmp_path: Path, base: Path) -> None:
    optim = PpoOptimConfig(lr=1e-2, batch_size=len(PROMPTS), micro_batch_tokens=1000)
    sampling = {"max_staleness": 1, "importance_cap": 2.0}
    with staged(tmp_path, base, sampling=sampling, updates=4, optim=optim) as (engine, stage):
        lines = stage.train()
        asked = [body["model"].rpartition("-")[0] for body in engine.paths(COMPLETIONS)]
    assert [line["engine/staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    batch = len(PROMPTS)
    versions = ["policy-0"] * 2 * batch + ["policy-1"] * batch + ["policy-2"] * batch
    assert asked == versions, "updates 0 and 1, then 2, then 3"
    assert lines[0]["engine/gap"] < 1e-5
    assert all(line["engine/gap"] > 1e-4 for line in lines[1:])
    assert all(line["policy/approxkl_first"] < 1e-10 for line in lines)


def test_answers_are_sampled_while_the_policy_learns(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"max_staleness": 1, "importance_cap": 2.0}
    with staged(tmp_path, base, sampling=sampling) as (engine, stage):
        learn, sampled = stage.trainer.learner.learn, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            if kwargs["update"] == 0 and kwargs["step"] == 0:
                for _ in range(200):
                    if len(engine.paths(COMPLETIONS)) == 2 * len(PROMPTS):
                        break
                    engine.over.wait(0.05)
                sampled.append(len(engine.paths(COMPLETIONS)))
            return learn(*args, **kwargs)

        monkeypatch.setattr(stage.trainer.learner, "learn", watched)
        stage.train()
    assert sampled == [2 * len(PROMPTS)], "those of the next update came before the first step"


def test_a_guard_samples_from_the_policy_as_it_is_even_if_answers_come_ahead(tmp_path: Path, base: Path) -> None:
    sampling = {"max_staleness": 1, "importance_cap": 2.0}
    optim = PpoOptimConfig(lr=1e-2, batch_size=4, micro_batch_tokens=1000)
    guard = GuardConfig(every=1, prompts=2)
    with staged(tmp_path, base, sampling=sampling, optim=optim, guard=guard) as (engine, stage):
        stage.train()
        held_out = [tuple(body["prompt"]) for body in engine.paths(COMPLETIONS)]
        guarded = {prompt for prompt in set(held_out) if held_out.count(prompt) == 4}
        versions = [
            body["model"].rpartition("-")[0] for body in engine.paths(COMPLETIONS) if tuple(body["prompt"]) in guarded
        ]
    assert sorted(set(versions)) == ["policy-0", "policy-1", "policy-2", "policy-3"]


def test_answers_under_another_versions_name_end_the_stage_before_anything_is_learned(
    tmp_path: Path, base: Path
) -> None:
    with staged(tmp_path, base, updates=2) as (engine, stage):
        before = [p.detach().clone() for p in stage.roles.policy.parameters()]
        engine.edit = lambda reply: reply | {"model": "policy-7-0000"}
        with pytest.raises(StageError, match="came from the weights 'policy-7-0000', not 'policy-0-"):
            stage.train()
        assert all(torch.equal(p, old) for p, old in zip(stage.roles.policy.parameters(), before, strict=True))


def gap_of(**changes: Any) -> EngineGap:
    return EngineGap(
        RolloutSamplingConfig(engine=Engine.vllm, **changes), whole_answers=False, where="stages.ppo.sampling"
    )


class Batch:
    def __init__(self, gap: float, versions: list[int]) -> None:
        self.response_mask = torch.tensor([[True, True, True], [True, False, False]])
        self.logprobs = torch.full((2, 3), -1.0) * self.response_mask
        off = torch.tensor([[gap, 0.0, -gap], [2 * gap, 99.0, 99.0]])
        self.sampled_logprobs = (self.logprobs - off) * self.response_mask
        self.rollout = type("Versions", (), {"versions": versions})()


def measured(gap: EngineGap, batch: Batch, update: int) -> tuple[Tensor | None, dict[str, float]]:
    metrics = UpdateMetrics(lambda values: values[None])
    return gap.importance(batch, update, metrics), metrics.values  # type: ignore[arg-type]


def test_a_gap_is_measured_on_answer_tokens_alone_and_corrected_with_a_cap() -> None:
    weights, values = measured(gap_of(importance_cap=1.15, gap_bound=0.15), Batch(0.1, [3, 3]), 3)
    of_gap = {
        "engine/gap": (0.1 + 0.0 + 0.1 + 0.2) / 4,
        "engine/beyond": 0.25,
        "engine/gap_max": 0.2,
        "engine/staleness": 0.0,
    }
    of_cap = {"engine/importance": (1.1051709 + 1.0 + 0.9048374 + 1.15) / 4, "engine/capped": 0.25}
    assert values == pytest.approx(of_gap | of_cap, abs=1e-6)
    close(weights, [[1.1051709, 1.0, 0.9048374], [1.15, 0.0, 0.0]], rtol=1e-6)
    weights, values = measured(gap_of(gap_bound=0.15), Batch(0.1, [0, 0]), 0)
    assert weights is None
    assert values == pytest.approx(of_gap, abs=1e-6)
    batch = Batch(0.1, [0, 0])
    batch.sampled_logprobs = None  # type: ignore[assignment]
    assert measured(gap_of(importance_cap=2.0), batch, 0) == (None, {}), "without an engine"


@pytest.mark.parametrize(
    ("versions", "allowed", "refused"), [([2, 2], 1, False), ([3, 2], 0, True), ([1, 1], 1, True), ([4, 4], 1, True)]
)
def test_answers_that_are_too_old_or_too_new_are_refused(versions: list[int], allowed: int, refused: bool) -> None:
    gap = gap_of(max_staleness=allowed, importance_cap=2.0)
    if not refused:
        measured(gap, Batch(0.1, versions), 3)
        return
    with pytest.raises(StageError, match=f"by the policy of update {min(versions)}") as raised:
        measured(gap, Batch(0.1, versions), 3)
    assert raised.value.where == "stages.ppo.sampling"


def test_a_gap_that_no_rounding_explains_is_other_weights_unless_the_policy_moved_on() -> None:
    """The mean over the four tokens is the gap."""
    measured(gap_of(), Batch(0.49, [3, 3]), 3)
    with pytest.raises(StageError, match=r"differ from the policy's by 0\.51 nats per token, so it has other weights"):
        measured(gap_of(), Batch(0.51, [3, 3]), 3)
    measured(gap_of(max_staleness=1, importance_cap=2.0), Batch(0.51, [2, 2]), 3)


@pytest.mark.parametrize("engine", list(Engine), ids=lambda engine: engine.value)
def test_a_stage_that_goes_on_says_that_answers_may_differ_if_an_engine_samples(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, engine: Engine
) -> None:
    sampling = {"engine": engine, "url": None} if engine is Engine.own else {}
    with staged(tmp_path, base, sampling=sampling, updates=1) as (server, stage), caplog.at_level(logging.WARNING):
        (line,) = stage.train()
        assert "uninterrupted run" not in caplog.text
        assert bool(server.calls) is any(name.startswith("engine/") for name in line) is (engine is Engine.vllm)
    with staged(tmp_path, base, sampling=sampling, updates=1) as (_, stage):
        stage.trainer.train(resume_from_checkpoint=str(max(stage.context.checkpoints.iterdir())))
    assert ("uninterrupted run" in caplog.text) is (engine is Engine.vllm)
