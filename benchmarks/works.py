"""What is measured, and who takes part. ``WORKS`` is the one table."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from benchmarks import grid
from benchmarks.figures import Sharing
from benchmarks.grid import LAUNCHER_MEMORY, start_of
from benchmarks.growth import POINTS
from benchmarks.setting import (
    AUTOCAST,
    LARGER_MICRO_BATCH_TOKENS,
    MICRO_BATCH_TOKENS,
    PPO_MEASURED,
    PPO_MICRO_BATCH_TOKENS,
    PPO_REPETITIONS,
    STEPS,
)
from benchmarks.work import (
    OURS,
    OURS_FLOAT32,
    Contestant,
    Rival,
    SamplingSize,
    Work,
    searched_contestants,
)

_STAGE = "the real stage, started by the launcher as the driver starts it; micro-batches of at most {} tokens"
_TRL = "TRL's trainer, fused AdamW"
_STOCK = "transformers and PEFT in a plain loop, {}, fused AdamW"


def _ours() -> Contestant:
    return Contestant(module="ours", allowed=_STAGE.format(MICRO_BATCH_TOKENS), against=None)


def _ours_larger() -> Contestant:
    return Contestant(
        module="ours",
        allowed=_STAGE.format(LARGER_MICRO_BATCH_TOKENS),
        against=None,
        optim_changes={"micro_batch_tokens": LARGER_MICRO_BATCH_TOKENS},
    )


def _ours_recomputed() -> Contestant:
    larger = _ours_larger()
    return replace(
        larger,
        allowed=f"activations computed again, as by TRL's defaults; {larger.allowed}",
        optim_changes={**larger.optim_changes, "activation_checkpointing": True},
    )


# ---- training ----------------------------------------------------------------------------------------------------


def _training(*, kind: str, adapter: str, stock: str, variants: dict[str, Contestant] | None = None) -> Work:
    trl, loop = (
        Rival(
            template=Contestant(module=module, allowed=allowed, library=library),
            axes=grid.training_axes(kind, adapter, checkpointing=library == "trl"),
            fixed={"padding_free": False, "precision": AUTOCAST},
        )
        for library, module, allowed in (("trl", "trl_latest", _TRL), ("stock", "stock", _STOCK.format(stock)))
    )
    default = start_of(trl.axes)
    return Work(
        kind=kind,
        adapter=adapter,
        contestants={
            OURS: _ours(),
            **(variants or {}),
            "trl_default": trl.contestant(default),
            "trl_as_it_comes": _as_it_comes(trl.contestant({**default, LAUNCHER_MEMORY.name: False})),
            **searched_contestants("trl", trl),
            **searched_contestants("stock", loop),
        },
        rivals={"trl": trl, "stock": loop},
        batches=STEPS,
    )


def _as_it_comes(contestant: Contestant) -> Contestant:
    return replace(contestant, allowed=f"{contestant.allowed}, idle threads that spin", threads_sleep=False)


# ---- updates -----------------------------------------------------------------------------------------------------


def _ppo(adapter: str) -> Work:
    lora = adapter == "lora"
    critic = ", a critic that learns with the same adapter as ours" if lora else ""
    rival = Rival(
        template=Contestant(
            module="trl_ppo",
            allowed=f"TRL 1.12.0 experimental.ppo, num_mini_batches=1, all base weights bf16{critic}",
            measured=PPO_MEASURED,
            environment="trl-1.12",
            library="trl",
        ),
        axes=grid.ppo_axes(),
        fixed={"critic": adapter},
    )
    default = rival.contestant(start_of(rival.axes))
    if lora:  # TRL's mode for PEFT gives an adapter to the policy alone
        default = replace(
            default,
            allowed=default.allowed.replace(critic, ""),
            setting={**default.setting, "critic": "full"},
            differs="its critic is trained whole",
        )
    ours = functools.partial(_our_ppo, PPO_MICRO_BATCH_TOKENS[adapter])
    variants = {
        "ours_shared": ours("policy and value in one pass", Sharing(one_pass=True)),
        "ours_4": ours("4 answers to each of 8 prompts", Sharing(completions=4)),
        "ours_shared_4": ours("both of these", Sharing(completions=4, one_pass=True)),
    }
    return Work(
        kind="ppo",
        adapter=adapter,
        contestants={
            OURS: ours("", master_weights=lora),
            **searched_contestants("trl", rival),
            "trl_default": default,
            **(variants if lora else {"ours_with_masters": ours("trained weights are held in float32")}),
        },
        rivals={"trl": rival},
        quantity="seconds_per_update",
        batches=1 + PPO_MEASURED,
        repetitions=PPO_REPETITIONS,
    )


def _our_ppo(
    micro_batch_tokens: int, difference: str, sharing: Sharing | None = None, *, master_weights: bool = True
) -> Contestant:
    return Contestant(
        module="ours",
        allowed=_STAGE.format(micro_batch_tokens),
        measured=PPO_MEASURED,
        against=None,
        sharing=sharing or Sharing(),
        master_weights=master_weights,
        differs=difference,
    )


def _grpo() -> Work:
    sharing = Sharing(critic=False, epochs=1)  # prompts are counted once each, however many answers they have
    rule = "a rule as the reward"
    stage = _STAGE.format(PPO_MICRO_BATCH_TOKENS["lora"])
    rival = Rival(
        template=Contestant(module="trl_grpo", allowed=f"{_TRL}; {rule}", library="trl", sharing=sharing),
        axes=grid.grpo_axes(),
        fixed={"layers_compiled": False},
    )
    return Work(
        kind="grpo",
        adapter="lora",
        contestants={
            OURS: Contestant(module="ours", allowed=f"{rule}; {stage}", against=None, sharing=sharing),
            "trl_default": rival.contestant(start_of(rival.axes)),
            **searched_contestants("trl", rival),
        },
        rivals={"trl": rival},
        quantity="seconds_per_update",
        batches=STEPS,
    )


# ---- answers -----------------------------------------------------------------------------------------------------

_OURS_SAMPLES = "models.forward.generate.generate, one batch, its model prepared as the stages do (use_flat_attention)"
_STOCK_SAMPLES = "model.generate(do_sample=True, top_k=0, top_p=1), left-padded batches"
_VLLM_SAMPLES = (
    "a vLLM server as a stage starts it (eager, log-probabilities of each token), with room for the keys and values of "
    "all answers or 1 GiB, all answers asked for at once; its memory is that of the server's processes"
)


def _generates(size: SamplingSize, dtype: str, *, against: str = OURS) -> Rival:
    common = size.system_tokens > 0
    begins = "; the common beginning is read once, into a cache that all rows begin with" if common else ""
    return Rival(
        template=Contestant(
            module="generate_sampling",
            allowed=f"{_STOCK_SAMPLES}{begins}, {dtype}",
            library="generate" if dtype == "bfloat16" else f"generate_{dtype}",
            against=against,
            dtype=dtype,
        ),
        axes=grid.sampling_axes(size.prompts, common=common),
        fixed={"cache": "dynamic"},
    )


def _sampling() -> Work:
    size = SamplingSize()
    rival, exact = _generates(size, "bfloat16"), _generates(size, "float32", against=OURS_FLOAT32)
    return Work(
        kind="sampling",
        adapter="none",
        contestants={
            OURS: _samples(_OURS_SAMPLES, "bfloat16", against=None),
            "generate": rival.contestant(start_of(rival.axes)),
            **searched_contestants("generate", rival),
            "vllm": _samples(_VLLM_SAMPLES, "bfloat16", engine="vllm"),
            OURS_FLOAT32: _samples(_OURS_SAMPLES, "float32", against=None),
            "generate_float32": exact.contestant(start_of(exact.axes)),
            **searched_contestants("generate_float32", exact),
            "vllm_float32": _samples(_VLLM_SAMPLES, "float32", engine="vllm", against=OURS_FLOAT32),
        },
        rivals={"generate": rival, "generate_float32": exact},
        size=size,
    )


def _sampling_many(*, system_tokens: int = 0) -> Work:
    """Many long answers; with ``system_tokens`` after a beginning that the prompts have in common."""
    size = SamplingSize(prompts=128, prompt_tokens=128, new_tokens=128, seeds=(0,), system_tokens=system_tokens)
    rival = _generates(size, "bfloat16")
    return Work(
        kind="sampling",
        adapter="none",
        contestants={
            OURS: _samples(_OURS_SAMPLES, "bfloat16", against=None),
            "generate": rival.contestant(start_of(rival.axes)),
            **searched_contestants("generate", rival),
            "vllm": _samples(_VLLM_SAMPLES, "bfloat16", engine="vllm"),
        },
        rivals={"generate": rival},
        size=size,
        repetitions=3,
    )


def _samples(how: str, dtype: str, *, engine: str | None = None, against: str | None = OURS) -> Contestant:
    module = "our_sampling" if engine is None else f"{engine}_sampling"
    return Contestant(module=module, allowed=f"{how}, {dtype}", engine=engine, against=against, dtype=dtype)


# ---- ours alone --------------------------------------------------------------------------------------------------


def _neighbour() -> Work:
    def variant(allowed: str, *, steps: int = 4, **settings: Any) -> Contestant:
        return Contestant(module="ours", allowed=allowed, measured=steps, **settings)

    return Work(
        kind="sft",
        adapter="lora",
        contestants={
            OURS: variant("alone, idle threads sleep soon", against=None),
            "beside_busy": variant("beside one process that computes", busy_neighbours=1),
            "spinning": variant("alone, idle threads spin as OpenMP's do by themselves", threads_sleep=False),
            "spinning_beside_busy": variant("spinning, beside it", steps=1, threads_sleep=False, busy_neighbours=1),
        },
    )


WORKS: dict[str, Work] = {
    **{
        f"sft_{adapter}": _training(
            kind="sft",
            adapter=adapter,
            stock="cross_entropy over all positions",
            variants={"ours_recomputed": _ours_recomputed()},
        )
        for adapter in ("lora", "full")
    },
    "reward_lora": _training(
        kind="reward",
        adapter="lora",
        stock="-logsigmoid of the score difference",
        variants={"ours_larger": _ours_larger(), "ours_recomputed": _ours_recomputed()},
    ),
    "dpo_lora": _training(
        kind="dpo",
        adapter="lora",
        stock="gather and logsumexp of answer tokens, reference by disable_adapter",
        variants={"ours_larger": _ours_larger(), "ours_recomputed": _ours_recomputed()},
    ),
    "kto_lora": _training(
        kind="kto",
        adapter="lora",
        stock="gather and logsumexp of answer tokens, reference by disable_adapter, four passes over answers as TRL's",
    ),
    "sampling": _sampling(),
    "sampling_128": _sampling_many(),
    "sampling_prefix": _sampling_many(system_tokens=256),
    "ppo_lora": _ppo("lora"),
    "ppo_full": _ppo("full"),
    "grpo_lora": _grpo(),
    "neighbour": _neighbour(),
    "growth": Work(kind="growth", adapter="lora", contestants={name: _ours() for name in POINTS}),
}
ALIASES = {"sft": ("sft_lora", "sft_full"), "reward": ("reward_lora",), "dpo": ("dpo_lora",), "kto": ("kto_lora",)}
ALIASES |= {"ppo": ("ppo_lora", "ppo_full"), "grpo": ("grpo_lora",), "all": tuple(WORKS)}


def works_named(text: str) -> list[str]:
    """The works that a comma-separated list of names and aliases stands for, in the table's order.

    Raises:
        ValueError: a name that is neither.
    """
    wanted: set[str] = set()
    for name in text.split(","):
        if name not in WORKS and name not in ALIASES:
            raise ValueError(f"no work '{name}'; one of: {', '.join([*ALIASES, *WORKS])}")
        wanted |= set(ALIASES.get(name, (name,)))
    return [name for name in WORKS if name in wanted]
