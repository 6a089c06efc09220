"""RL without a critic beside TRL's own trainers: one loss and one gradient on the same answers and scores, in float32.

TRL prepares its inputs as in training, advantages included; only its sampling gives the answers that our stage sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from alignment.config.critic import Critic
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm
from tests.tiny import tiny_tokenizer
from tests.unit.training.ppo_bench import PROMPTS, Bench, TokenRewards, optim
from tests.unit.training.ppo_steps import Rows, Weights, taken

BETA, CLIP, CLIP_HIGH, ENTROPY, TEMPERATURE, GROUP, NEW = 0.3, 0.02, 0.05, 0.1, 0.8, 4, 6
PAPER = {"entropy_coef": ENTROPY, "use_bias_correction_kl": False}
"""By default TRL multiplies the KL by the ratio, unlike Shao et al. 2024, eq. 4."""
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rloo": (RLOOTrainer, RLOOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", **PAPER}),
    "dr_grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none", **PAPER}),
}


def score(answer: Sequence[int]) -> float:
    return sum(answer) / 16 - 0.8 * len(answer)


def run_of(bench: Callable[..., Bench], method: str) -> Bench:
    return bench(
        updates=2,
        ppo_epochs=2,
        num_minibatches=1,
        prompts=PROMPTS,
        reward=False,
        rewards=TokenRewards(lambda prompt, answer: score(answer)),
        advantage=Advantage(method),
        critic=Critic.none,
        kl=KlConfig(coefficient=BETA, apply_to=KlTerm.reward if method == "rloo" else KlTerm.loss),
        completions_per_prompt=GROUP,
        temperature=TEMPERATURE,
        max_new_tokens=NEW,
        clip=CLIP,
        clip_high=CLIP_HIGH,
        entropy_coefficient=0.0 if method == "rloo" else ENTROPY,  # TRL's RLOO has none
        missing_eos_penalty=0.0,
        optim=optim(lr=3e-3, batch_size=len(PROMPTS) * GROUP, micro_batch_tokens=60, max_grad_norm=1e9),
    )


def trl_trainer(folder: Path, base: Path, method: str, rows: Rows) -> Any:
    """TRL's trainer, whose sampling gives our answers and whose reward is our score."""
    kind, config, changes = TRAINERS[method]
    answers = [answer for _, answer in rows]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [score(answer) for answer in completion_ids],
        args=config(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows),
            num_generations=GROUP,
            num_iterations=2,  # so that it keeps the old log-probabilities
            max_completion_length=NEW,
            temperature=TEMPERATURE,
            beta=BETA,
            epsilon=CLIP,
            epsilon_high=CLIP_HIGH,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **changes,
        ),
        train_dataset=Dataset.from_list([{"prompt": "unused"}] * len(rows)),
        processing_class=tiny_tokenizer(),
    )
    trainer._tokenize_prompts = lambda prompts: ([prompt for prompt, _ in rows], None, {})
    trainer._generate_single_turn = lambda *_: answers if method == "rloo" else (answers, None)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss_at(trainer: Any, weights: Weights, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    load(trainer, weights)
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.model.zero_grad()
    loss.backward()
    return loss.item(), {f"policy.{name}": p.grad.clone() for name, p in trainer.model.named_parameters()}


def load(trainer: Any, weights: Weights) -> None:
    own = {name.removeprefix("policy."): held.float() for name, held in weights.items()}
    trainer.model.load_state_dict(own, strict=False)
    assert {name for name, _ in trainer.model.named_parameters()} <= own.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", list(TRAINERS))
def test_loss_and_gradient_are_those_of_trl(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """Both epochs of the second update: at first all ratios are 1, then policy, old policy and reference are three."""
    run = run_of(bench, method)
    trace = taken(run, monkeypatch)
    rows = trace.rows[1]
    trainer = trl_trainer(tmp_path / "trl", run.context.spec.base_path, method, rows)
    load(trainer, trace.before[2])
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "unused"}] * len(rows))
    losses, gradients = zip(*(loss_at(trainer, trace.before[step], inputs) for step in (2, 3)), strict=True)
    figures = run.metrics()[1]
    ours = figures["loss/policy"]
    if method != "rloo":
        ours += BETA * figures["loss/kl"] - ENTROPY * figures["policy/entropy"]
    assert ours == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert len({len(answer) for _, answer in rows}) > 1
    assert figures["policy/clipfrac"] > 0.05
    for step, gradient in zip((2, 3), gradients, strict=True):
        assert trace.gradients[step].keys() == gradient.keys()
        for name, expected in gradient.items():
            assert float((trace.gradients[step][name] - expected).norm() / expected.norm()) < 1e-3, name
