"""What is measured, and who takes part. ``WORKS`` is the one table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Sharing
from benchmarks.setting import (
    MAX_PROMPT_LENGTH,
    MICRO_BATCH_TOKENS,
    PPO_MICRO_BATCH,
    PPO_MICRO_BATCH_TOKENS,
    PROMPTS,
    REPETITIONS,
)

OURS = "ours"
OURS_FLOAT32 = "ours_float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """``module`` runs one measurement. ``allowed`` says what it was given. ``measured`` steps follow one warm-up step.

    ``against`` names which of ours a rival is compared with; None for our own. ``environment`` names a requirements
    file in ``environments/``, or None for the project's own. ``engine`` is the package of an engine that the contestant
    asks, whose environment `make engine` builds. ``sharing`` is about PPO, ``master_weights`` about full training of
    ours, ``optim_changes`` are settings of its optimiser that a variant of ours changes (none of PPO).
    ``our_memory`` says whether it has what the launcher tells glibc about memory, ``threads_sleep`` whether its idle
    threads sleep soon as the launcher says, or spin as OpenMP's do by themselves. ``busy_neighbours`` processes compute
    beside it, a core each.
    """

    module: str
    allowed: str
    measured: int = 2
    against: str | None = OURS
    environment: str | None = None
    engine: str | None = None
    sharing: Sharing = field(default_factory=Sharing)
    master_weights: bool = True
    optim_changes: dict[str, Any] = field(default_factory=dict)
    our_memory: bool = True
    threads_sleep: bool = True
    busy_neighbours: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSize:
    """What ``sampling`` samples: an answer of at most ``new_tokens`` to each of ``prompts`` prompts, once a seed.

    A prompt has at most ``prompt_tokens``. With ``system_tokens`` it is then put behind one system turn, whose text has
    this number of tokens (in place of the template's own turn, if it has one).
    """

    prompts: int = PROMPTS
    prompt_tokens: int = MAX_PROMPT_LENGTH
    new_tokens: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    system_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """``kind`` is ``sft``, ``reward``, ``dpo``, ``kto``, ``ppo``, ``grpo``, ``sampling`` or ``growth``.

    ``adapter`` is ``lora`` or ``full``. ``quantity`` is what ratios are about, beside peak memory. ``size`` is about
    ``sampling``. A published result has ``repetitions`` or more.
    """

    kind: str
    adapter: str
    contestants: dict[str, Contestant] = field(default_factory=dict)
    quantity: str = "tokens_per_second"
    size: SamplingSize = field(default_factory=SamplingSize)
    repetitions: int = REPETITIONS


_STAGE = "the real stage, started by the launcher as the driver starts it; micro-batches of at most {} tokens"
_DEFAULT = "TRL's defaults (gradient checkpointing on, bf16 autocast, fused AdamW)"
_PLAIN_SHELL = "started as from a shell, without our launcher's settings of glibc's memory"
_TUNED = "checkpointing off"
_NO_CASTS = "PEFT's input casts off (peft.helpers.disable_input_dtype_casting)"
_STOCK = "padded batch, no checkpointing, bf16 autocast, fused AdamW"


def _ours(tokens: int = MICRO_BATCH_TOKENS) -> Contestant:
    return Contestant(module="ours", allowed=_STAGE.format(tokens), against=None)


def _ours_recomputed(tokens: int) -> Contestant:
    return Contestant(
        module="ours",
        allowed=f"activations computed again, as by TRL's defaults; {_STAGE.format(tokens)}",
        against=None,
        optim_changes={"activation_checkpointing": True, "micro_batch_tokens": tokens},
    )


def _training(
    *, kind: str, adapter: str, tuned: str, stock: str, variants: dict[str, Contestant] | None = None
) -> Work:
    casts = f"; {_NO_CASTS}" if adapter == "lora" else ""
    return Work(
        kind=kind,
        adapter=adapter,
        contestants={
            OURS: _ours(),
            **(variants or {}),
            "trl_default": Contestant(module="trl_latest", allowed=_DEFAULT, measured=1),
            "trl_as_it_comes": Contestant(
                module="trl_latest", allowed=f"{_DEFAULT}; {_PLAIN_SHELL}", measured=1, our_memory=False
            ),
            "trl_tuned": Contestant(module="trl_latest", allowed=f"{_TUNED}{tuned}{casts}", measured=1),
            "stock_tuned": Contestant(module="stock", allowed=f"transformers, {stock}; {_STOCK}{casts}"),
        },
    )


def _ppo(adapter: str) -> Work:
    name, critic = ("peft", "; its critic is trained whole") if adapter == "lora" else ("full", "")
    rival = Contestant(
        module="trl_ppo",
        allowed=f"TRL 1.12.0 experimental.ppo, num_mini_batches=1, micro-batches of 8 rows, all weights bf16{critic}",
        measured=1,
        environment="trl-1.12",
    )
    ours = functools.partial(_our_ppo, PPO_MICRO_BATCH_TOKENS[adapter])
    variants = {
        "ours_shared": ours("policy and value in one pass", Sharing(one_pass=True)),
        "ours_4": ours("4 answers to each of 8 prompts", Sharing(completions=4)),
        "ours_shared_4": ours("both", Sharing(completions=4, one_pass=True)),
    }
    if adapter == "full":
        variants = {"ours_without_masters": ours("all weights bf16, as the rival's", master_weights=False)}
    return Work(
        kind="ppo",
        adapter=adapter,
        contestants={
            OURS: ours("a critic of its own"),
            **variants,
            f"trl_1_12_{name}": rival,
        },
        quantity="seconds_per_update",
    )


def _our_ppo(
    micro_batch_tokens: int, difference: str, sharing: Sharing | None = None, *, master_weights: bool = True
) -> Contestant:
    return Contestant(
        module="ours",
        allowed=f"{difference}; {_STAGE.format(micro_batch_tokens)}",
        measured=1,
        against=None,
        sharing=sharing or Sharing(),
        master_weights=master_weights,
    )


def _grpo() -> Work:
    sharing = Sharing(critic=False, epochs=1)  # prompts are counted once each, however many answers they have
    rule = "a rule as the reward"
    checkpointed = f"{_DEFAULT}, micro-batches of {PPO_MICRO_BATCH} rows; {rule}"
    # PEFT's input casts stay: TRL samples outside of autocast, where factors in float32 need them.
    tuned = f"checkpointing off, micro-batches of {PPO_MICRO_BATCH} rows; {rule}"
    stage = _STAGE.format(PPO_MICRO_BATCH_TOKENS["lora"])
    return Work(
        kind="grpo",
        adapter="lora",
        contestants={
            OURS: Contestant(module="ours", allowed=f"{rule}; {stage}", against=None, sharing=sharing),
            "trl_default": Contestant(module="trl_grpo", allowed=checkpointed, measured=1, sharing=sharing),
            "trl_tuned": Contestant(module="trl_grpo", allowed=tuned, measured=1, sharing=sharing),
        },
        quantity="seconds_per_update",
    )


_OURS_SAMPLES = "models.forward.generate.generate, one batch, its model prepared as the stages do (use_flat_attention)"
_STOCK_SAMPLES = "model.generate(do_sample=True, top_k=0, top_p=1), one left-padded batch"
_VLLM_SAMPLES = (
    "a warm server of alignment.engines, which forgets its prompts between measurements; all answers are asked for at "
    "once, and the time is that of the client's call; memory is the sum of the highest resident sets of the server's "
    "processes, the client not counted"
)


def _sampling() -> Work:
    return Work(
        kind="sampling",
        adapter="none",
        contestants={
            OURS: _samples(_OURS_SAMPLES, "bf16", against=None),
            "generate": _samples(_STOCK_SAMPLES, "bf16"),
            "vllm": _samples(_VLLM_SAMPLES, "bf16", engine="vllm"),
            OURS_FLOAT32: _samples(_OURS_SAMPLES, "float32", against=None),
            "generate_float32": _samples(_STOCK_SAMPLES, "float32", against=OURS_FLOAT32),
            "vllm_float32": _samples(_VLLM_SAMPLES, "float32", engine="vllm", against=OURS_FLOAT32),
        },
    )


def _sampling_many(*, system_tokens: int = 0) -> Work:
    """Many long answers; with ``system_tokens`` after a beginning that the prompts have in common."""
    common = "; the common beginning is read once, into a cache that all rows begin with" if system_tokens else ""
    return Work(
        kind="sampling",
        adapter="none",
        contestants={
            OURS: _samples(_OURS_SAMPLES, "bf16", against=None),
            "generate": _samples(f"{_STOCK_SAMPLES}{common}", "bf16"),
            "vllm": _samples(_VLLM_SAMPLES, "bf16", engine="vllm"),
        },
        size=SamplingSize(prompts=128, prompt_tokens=128, new_tokens=128, seeds=(0,), system_tokens=system_tokens),
        repetitions=3,
    )


def _samples(how: str, dtype: str, *, engine: str | None = None, against: str | None = OURS) -> Contestant:
    module = "sampling" if engine is None else f"{engine}_sampling"
    return Contestant(module=module, allowed=f"{how}, {dtype}", engine=engine, against=against)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point of ``growth``: ``rows`` rows of exactly ``length`` tokens, on the base or on a random model.

    With ``one_question`` the rows answer one question of about three quarters of ``length``, each in its own words.
    """

    rows: int
    length: int
    one_question: bool = False
    model: str | None = None


_STEP_TOKENS = 4096
POINTS = {
    **{f"length_{n}": Point(rows=_STEP_TOKENS // n, length=n) for n in (128, 256, 512, 1024, 2048)},
    **{f"rows_{n}": Point(rows=n, length=128) for n in (4, 8, 16)},
    **{f"completions_{n}": Point(rows=n, length=320, one_question=True) for n in (1, 2, 4, 6)},
    **{f"size_{name}": Point(rows=8, length=512, model=name) for name in ("10m", "30m")},
}
SERIES = {
    "tokens a row (4096 a step)": ("length_128", "length_256", "length_512", "length_1024", "length_2048"),
    "rows of 128 tokens": ("rows_4", "rows_8", "rows_16", "length_128"),
    "completions of one prompt": ("completions_1", "completions_2", "completions_4", "completions_6"),
    "parameters (8 rows of 512)": ("size_10m", "size_30m", "length_512"),
}
MODEL_SIZES = {
    "10m": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 14, "num_attention_heads": 2},
    "30m": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 12, "num_attention_heads": 5},
}
"""Random Llama models on the base's tokenizer; the third size is the base itself."""


WORKS: dict[str, Work] = {
    "sft_lora": _training(
        kind="sft", adapter="lora", tuned="; padding_free=True", stock="cross_entropy over all positions"
    ),
    "sft_full": _training(
        kind="sft", adapter="full", tuned="; padding_free=True", stock="cross_entropy over all positions"
    ),
    "reward_lora": _training(
        kind="reward",
        adapter="lora",
        tuned="",
        stock="-logsigmoid of the score difference",
        variants={"ours_recomputed": _ours_recomputed(768)},
    ),
    "dpo_lora": _training(
        kind="dpo", adapter="lora", tuned="", stock="log_softmax and gather, reference by disable_adapter"
    ),
    "kto_lora": _training(
        kind="kto",
        adapter="lora",
        tuned="",
        stock="log_softmax and gather, reference by disable_adapter; four passes over the answers, as TRL's",
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
