"""The stage kind ``ppo``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config.data import PtxConfig
from alignment.config.faults import Fault, unread_faults, unread_notes
from alignment.config.launch import LaunchConfig, Sharding
from alignment.config.model import Critic
from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Question, Reasoned, Rows
from alignment.config.run import RunConfig
from alignment.config.scoring import MemberConfig
from alignment.core.artifacts import POLICY, REWARD_MODEL, read_manifest
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair, Prompt
from alignment.data.tokens.row_kinds import CONVERSATIONS, PROMPTS, Limits
from alignment.rewards.scorer_sources import REWARD, is_known, with_members
from alignment.stages import base
from alignment.stages.ppo import checks
from alignment.stages.ppo.config import KlConfig, KlControl, OverlongConfig, PpoConfig
from alignment.stages.shared.kind_answers import (
    ROW_COUNTS,
    check_engine,
    curve,
    missing_reward_faults,
    reward_model_slots,
    sampling_refusals,
)
from alignment.stages.shared.new_settings import (
    adapter_rate,
    data_of,
    from_start,
    maximises_scores,
    new_tokens,
    row_limit,
    rows_with_answers,
)

LENGTH, OVERLONG = "penalty/length", "penalty/overlong"
"""What penalties took from the scores; each is reported if it is in use."""
SCORE_STD = "objective/score_std"
"""The standard deviation of the scores of an update, if it has several answers."""
TIED_SHARE = "objective/tied_share"
"""The share of an update's prompts whose answers all have the same score."""


def _data(config: PpoConfig) -> list[base.DataSlot]:
    return [
        base.DataSlot(field="data", data=config.data, record=Prompt, rows=PROMPTS),
        base.DataSlot(
            field="ptx.data",
            data=config.ptx.data,
            record=Conversation,
            rows=CONVERSATIONS,
            in_use=config.ptx.coefficient > 0,
        ),
    ]


def _as_read(config: PpoConfig) -> PpoConfig:
    return replace(config, ptx=PtxConfig()) if config.ptx.coefficient == 0.0 else config


def _faults(config: PpoConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    yield from _scorer_faults(config, where)
    yield from checks.critic_faults(config, where)
    yield from checks.engine_faults(config, where)
    if config.kl.control is not KlControl.adaptive:
        reader = "only kl.control 'adaptive'"
        yield from unread_notes(config.kl, KlConfig(), ("target", "horizon"), f"{where}.kl", reader)
    elif config.kl.coefficient == 0.0:
        message = "0, which kl.control 'adaptive' only multiplies; choose a larger value, or kl.control=fixed"
        yield Fault(where=f"{where}.kl.coefficient", message=message)
    elif config.kl.horizon * 5 <= config.optim.batch_size:
        # An update multiplies the coefficient by at least 1 - .2 * episodes / horizon (algos/ppo.py).
        message = (
            f"{config.kl.horizon} episodes, of which one update has {config.optim.batch_size}, so that an update with "
            f"little KL would make the coefficient zero or negative; choose more than {config.optim.batch_size // 5}"
        )
        yield Fault(where=f"{where}.kl.horizon", message=message)
    if config.overlong.buffer > config.max_new_tokens:
        message = f"{config.overlong.buffer} tokens; choose at most max_new_tokens, {config.max_new_tokens}"
        yield Fault(where=f"{where}.overlong.buffer", message=message)
    if not config.overlong.buffer:
        yield from unread_faults(
            config.overlong, OverlongConfig(), ("weight",), f"{where}.overlong", "a buffer above 0"
        )
    steps = config.ppo_epochs * config.num_minibatches
    if steps < 3:  # the first minibatch never exceeds it, and the second can only skip later ones
        reader = f"only an update of 3 or more minibatches (ppo_epochs * num_minibatches, {steps})"
        yield from unread_notes(config, PpoConfig(), ("max_approxkl",), where, reader)
    if config.critic_warmup >= config.updates:
        message = f"{config.critic_warmup} of {config.updates} updates, so the policy never learns; choose fewer"
        yield Fault(where=f"{where}.critic_warmup", message=message)


def _scorer_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    if checks.GUARD in checks.in_use(config):
        yield from _guard_faults(config, f"{where}.{checks.GUARD}")
    yield from missing_reward_faults(checks.in_use(config), config.reward, where)
    sources = [scorer.source for scorer in checks.in_use(config).values()]
    if config.reward is None or REWARD in sources or not all(map(is_known, sources)):
        return  # a misspelt source may have been meant to use it
    if config.critic is not Critic.separate or _is_external(config.reward):
        why = {
            Critic.separate: "a critic can start only from a reward model that a stage made",
            Critic.shared: "a shared critic starts at 0",
            Critic.none: "there is no critic that could start from it",
        }[config.critic]
        message = f"{config.reward!r} is unused: no scorer is '{REWARD}', and {why}; write null, or add the scorer"
        yield Fault(where=f"{where}.reward", message=message)


def _guard_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    """Policies are compared by this scorer, so it must score all policies alike, and not give all the same score."""
    scorer = config.guard.scorer
    for field, part in with_members({where: scorer}).items():
        if isinstance(part, MemberConfig) and part.normalize:
            message = "true, but a running normalisation cannot compare policies; set it to false"
            yield Fault(where=f"{field}.normalize", message=message)
    if scorer.weight == 0.0:
        yield Fault(where=f"{where}.weight", message="0, so all policies would score the same; choose another weight")


def _is_external(ref: str) -> bool:
    """Whether a reference names a reward model that no stage made."""
    if ref.startswith("path:"):
        folder = Path(ref.removeprefix("path:")).expanduser().absolute()
        return folder.is_dir() and read_manifest(folder) is None
    return ref.startswith("hub:")


def _refusals(config: PpoConfig, launch: LaunchConfig) -> Iterator[base.Refusal]:
    yield from sampling_refusals(config.sampling, launch)
    if launch.sharding.by_deepspeed and config.critic_warmup:
        why = "DeepSpeed updates all weights, including the policy's"
        yield base.Refusal(field="critic_warmup", why=why, instead="critic_warmup=0, or launch=ddp")
    if launch.sharding is Sharding.fsdp and config.critic_warmup:
        why = "PyTorch's sharded checkpoints need moments of all weights, and the policy has none yet"
        yield base.Refusal(field="critic_warmup", why=why, instead="critic_warmup=0, or launch=ddp")
    if launch.sharding is Sharding.fsdp and config.drop_ties:
        why = "PyTorch's sharded checkpoints need moments, and a first update in which all groups tie leaves none"
        yield base.Refusal(field="drop_ties", why=why, instead="drop_ties=false, or launch=ddp")
    if launch.sharding in (Sharding.zero3, Sharding.fsdp) and config.ptx.coefficient:
        why = "its forward passes bypass the module that gathers sharded weights"
        yield base.Refusal(field="ptx.coefficient", why=why, instead="launch=zero2")


def _too_few_prompts(config: PpoConfig, num_prompts: int, where: str) -> Iterator[Fault]:
    if config.guard.every and config.guard.prompts >= num_prompts:
        message = f"{config.guard.prompts} prompts cannot be held out of {num_prompts}; choose fewer, or guard.every=0"
        yield Fault(where=f"{where}.guard.prompts", message=message)


def _reported(config: PpoConfig) -> base.Reported:
    training = ("objective/score", "objective/kl", "response_length", "eos_rate")
    of_several = (SCORE_STD,) if config.optim.batch_size > 1 else ()
    of_groups = (TIED_SHARE,) if config.critic is Critic.none else ()
    counts = (*ROW_COUNTS, "updates", "memory/base_copies")
    families = ("guard/",) if config.guard.every else ()
    of_engine = checks.reported_of_engine(config.sampling)
    return base.Reported(training=(*training, *of_several, *of_groups, *of_engine), counts=counts, families=families)


def _why_missing(config: PpoConfig, metric: str, stage: str) -> str:
    if config.guard.every or not metric.startswith("guard/"):
        return ""
    return f"stage {stage!r} reports no {metric!r} without a guard; set stages.{stage}.guard.every above 0"


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    doubts = []
    if metrics.get("eos_rate") == 0.0:
        doubts.append(
            "none of the last update's answers ended within max_new_tokens, so all were cut off; raise "
            "max_new_tokens, or start from a policy that ends its answers"
        )
    if metrics.get(SCORE_STD) == 0.0 or metrics.get(TIED_SHARE) == 1.0:
        doubts.append(
            "all answers to each of the last update's prompts had the same score, so there was nothing to learn from; "
            "use a scorer that distinguishes them"
        )
    return [*doubts, *checks.engine_doubts(metrics)]


def _against_forgetting(name: str) -> str:
    return (
        f"use replay: stages.{name}.ptx.coefficient=1.0 stages.{name}.ptx.data.source=bundled:general/conversations "
        "also trains on general conversations; or lower its optim.lr"
    )


def _curves(settings: Mapping[str, Any]) -> list[base.Curve]:
    without_critic = settings.get("critic") == Critic.none.value
    absent = ("loss/value", "val/explained_variance") if without_critic else ("objective/tied_prompts",)
    return [chart for chart in _all_curves() if chart.keys[0] not in absent]


def _sampled_tokens(settings: Mapping[str, Any], line: Mapping[str, Any]) -> float | None:
    """Tokens of the answers of an update, which has one line."""
    length, optim = line.get("response_length"), settings.get("optim")
    episodes = optim.get("batch_size") if isinstance(optim, Mapping) else None
    return length * episodes if isinstance(length, float) and isinstance(episodes, int) else None


def _all_curves() -> list[base.Curve]:
    return [
        curve("Score", "what PPO maximises, mean over an update", "objective/score"),
        curve("KL to the reference", "nats per sequence", "objective/kl"),
        base.Curve(
            title="Held-out answers, over √KL",
            unit="mean score: what PPO maximises, and the guard's held-out scorer",
            keys=("guard/proxy", "guard/scorer"),
            labels=("training score", "held-out scorer"),
            over="guard/kl",
        ),
        base.Curve(title="KL coefficient", unit="", keys=("objective/kl_coef",), only_if_it_moves=True),
        curve("Policy loss", "", "loss/policy"),
        curve("Value loss", "", "loss/value"),
        curve("Clipped", "share of tokens", "policy/clipfrac"),
        curve(
            "Explained variance", "of the value model; dotted: no better than a constant", "val/explained_variance", 0.0
        ),
        curve(
            "Prompts without score differences", "whose answers all score alike, in an update", "objective/tied_prompts"
        ),
        curve(
            "Penalties",
            "subtracted from the score, mean over an update",
            (LENGTH, OVERLONG),
            labels=("length", "overlong"),
        ),
        curve("Answer length", "tokens", "response_length"),
        curve("Answers that ended", "share", "eos_rate"),
        *checks.engine_curves(),
    ]


_WITH_PROMPTS = (Prompt, PreferencePair, LabelledAnswer, Conversation)
"""Records that have prompts; the first that are there are asked."""
_COMPLETIONS, _EPISODES = 4, 32
_LEAST_UPDATES, _MOST_UPDATES = 20, 200
_QUICKSTART = "as in quickstart"


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if Prompt in circumstances.rows and PreferencePair not in circumstances.rows:
        yield SCORER


def _stage(circumstances: Circumstances) -> NewStage | None:
    scorer, models = circumstances.answer(SCORER), circumstances.made.get(REWARD_MODEL, ())
    rows = next((circumstances.rows[record] for record in _WITH_PROMPTS if record in circumstances.rows), None)
    if rows is None or not (scorer or models) or not maximises_scores(circumstances):
        return None
    answers = new_tokens(rows_with_answers(circumstances), circumstances)
    left = replace(circumstances, positions=circumstances.positions - answers.value)
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        **_scores(scorer, models[0] if models else ""),
        **_size(rows),
        "critic": Reasoned(
            value="shared", why="one pass for policy and values; separate needs memory for a second model"
        ),
        "prompt_baseline": Reasoned(value=True, why=f"scores of different prompts are not comparable; {_QUICKSTART}"),
        "gae_lambda": Reasoned(value=1.0, why=f"a shared critic starts at 0; {_QUICKSTART}"),
        "value_clip": Reasoned(value=10.0, why=_QUICKSTART),
        **row_limit(rows, left, "max_prompt_length", part="prompts"),
        "max_new_tokens": answers,
        "kl": {
            "coefficient": Reasoned(
                value=0.05, why="Huang et al. 2024; a larger value keeps the policy closer to its start"
            )
        },
    }
    return NewStage(why="Samples answers to the prompts and raises their scores.", settings=settings, reads=rows)


def _scores(scorer: str, model: str) -> dict[str, Any]:
    """What scores answers: the run's reward model, what the user named, or both."""
    reward = f"stage:{model}" if model else None
    why = "trained on the pairs above" if model else "none; the scorers below are used instead"
    settings: dict[str, Any] = {"reward": Reasoned(value=reward, why=why)}
    if scorer:
        sources = [*(["reward"] if model else []), scorer]
        value = [{"source": source} for source in sources]
        settings["scorers"] = Reasoned(value=value, why="their scores are added; give each a weight if needed")
    return settings


def _size(rows: Rows) -> dict[str, Any]:
    """Updates, and how many answers each samples."""
    asked = max(1, min(rows.prompts, _EPISODES // _COMPLETIONS))
    passes = math.ceil(rows.prompts / asked)
    updates = min(_MOST_UPDATES, max(_LEAST_UPDATES, passes))
    bounds = f"chosen, not tuned: from {_LEAST_UPDATES} to {_MOST_UPDATES}"
    why = f"{passes:,} ask all {rows.prompts:,} prompts once ({bounds})"
    rate = adapter_rate(1e-4, "chosen, not tuned: 3e-5 in qwen_0_5b_rlhf_lora, 1e-3 in quickstart")
    size = Reasoned(value=asked * _COMPLETIONS, why=f"answers to {asked} prompts in an update (chosen, not tuned)")
    return {
        "updates": Reasoned(value=updates, why=why),
        "completions_per_prompt": Reasoned(value=_COMPLETIONS, why=_QUICKSTART),
        "optim": {"lr": rate, "critic_lr": Reasoned(value=1e-4, why="like the policy's"), "batch_size": size},
    }


KIND = base.StageKind(
    name="ppo",
    summary="PPO, RLOO or GRPO on scores of the policy's own answers",
    config=PpoConfig,
    revision=14,
    produces=POLICY,
    run="alignment.stages.ppo.run:run",
    rehearse="alignment.stages.ppo.run:refuse_base",
    data=_data,
    scorers=checks.in_use,
    faults=_faults,
    as_read=_as_read,
    curves=_curves,
    headline="objective/score",
    tokens=_sampled_tokens,
    references=base.References(more=lambda config: reward_model_slots(checks.in_use(config))),
    launch=base.LaunchShape(
        refusals=_refusals,
        size_faults=checks.size_faults,
        check_machine=lambda config, where: check_engine(config.sampling, where),
        notes=checks.engine_notes,
    ),
    learning=base.Learning(
        limits=lambda config: Limits(row=config.max_prompt_length, too_long=config.too_long),
        faults=_too_few_prompts,
        batches_of_rows=False,
        learns_from=base.LearnsFrom.scores,
    ),
    outcome=base.Outcome(
        metrics=_reported, why_missing=_why_missing, doubts=_doubts, against_forgetting=_against_forgetting
    ),
    proposals=base.Proposals(questions=_questions, stage=_stage),
)
