"""What a run is drawn from: architectures, formats, adapters, methods, sizes, and rows that nobody chose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.real_templates import CASES, text_of
from tests.templates import STYLES

SHIPPED = Path(__file__).parents[2] / "data"
PUBLIC = Path(__file__).parents[3] / "shared" / "data"
PAIRS = (
    SHIPPED / "quickstart/preferences.jsonl",
    PUBLIC / "hh-rlhf/harmless_base.jsonl",
    PUBLIC / "oasst/pairs.jsonl",
    PUBLIC / "llamafactory-demo/dpo_en_demo.json",
)
DEMONSTRATIONS = (
    SHIPPED / "quickstart/conversations.jsonl",
    PUBLIC / "llamafactory-demo/alpaca_en_demo.json",
    PUBLIC / "torchtune-tiny/chat_tiny.json",
)
FILES = {
    "cpt": (SHIPPED / "general/texts.jsonl", PUBLIC / "llamafactory-demo/c4_demo.jsonl"),
    "sft": DEMONSTRATIONS,
    "reward": PAIRS,
    "dpo": PAIRS,
    "kto": (*PAIRS, PUBLIC / "llamafactory-demo/kto_en_demo.json"),
    "ppo": PAIRS,
}
ANSWERS = ("chosen", "rejected", "completion", "output")
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "cohere": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
"""Architectures with settings of theirs; the sizes that all have are in ``models.py``."""
WITH_EXPERTS = ("mixtral", "qwen2_moe")
REAL = {case.title: case for case in CASES if case.without_thought and text_of(case.name)}
"""Real chat templates that are on this machine; those whose prompts open a thought refuse answers without one."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A run: everything that it depends on, as plain data, so that it can be written down and run again. ``rows`` says
    for each stage from which file, from which row on and how many rows it takes, how many characters of an answer are
    kept, and whether refused rows are skipped. ``stages`` are the settings of each stage by its name. ``killed`` is the
    number of the checkpoint after which the last stage is killed. ``tokens`` is another size of its micro-batches.
    ``template`` is the tokenizer's, ``export`` the form in which the result is exported. With ``costs`` its memory is
    planned first."""

    architecture: str
    biased: bool
    dtype: str
    processes: int
    stages: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, Any]]
    killed: int | None = None
    tokens: int | None = None
    evaluated: bool = False
    seed: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    template: str = "smollm2"
    export: str | None = None
    costs: bool = False

    @property
    def last(self) -> str:
        """The name of the stage that is looked at."""
        return list(self.stages)[-1]

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, file: Path) -> Draw:
        """What ``write`` wrote."""
        return cls(**json.loads(file.read_text()))


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Any run of up to three stages."""
    architecture = draw(st.sampled_from(list(FAMILIES)))
    dtype = draw(st.sampled_from(["bfloat16", "float32", "bfloat16"]))
    kind = draw(st.sampled_from(["sft", "cpt", "reward", "dpo", "dpo", "kto", "kto", "ppo", "ppo", "ppo"]))
    has_sft = kind not in ("sft", "cpt") and draw(st.booleans())
    adapters = _adapters(architecture, dtype)
    first = draw(adapters)
    adapter = draw(adapters) if draw(st.booleans()) else first
    has_reward = kind == "ppo" and draw(st.booleans())
    kinds = ["sft"] * has_sft + ["reward"] * has_reward + [kind]
    stages, rows = {}, {}
    for name in kinds:
        own = dict(first if name == "sft" else adapter)
        if not (has_sft and name != "sft") or first["kind"] == "full" or _is_apart(first, own):
            own.pop("chain", None)
        rows[name] = draw(_rows(name))
        stages[name] = {"adapter": own, **draw(_settings(name, own, has_reward=has_reward))}
        if name not in ("sft", "cpt"):
            stages[name]["init"] = "stage:sft" if has_sft else "base"
    processes = draw(st.sampled_from([1, 1, 1, 2]))
    for settings in stages.values():
        settings["optim"]["batch_size"] *= processes
    is_trained = kind != "ppo" or stages[kind].get("ppo_epochs", 1) == 1
    return Draw(
        architecture=architecture,
        biased=draw(st.booleans()),
        dtype=dtype,
        processes=processes,
        stages=stages,
        rows=rows,
        killed=draw(st.sampled_from([None, None, 1, 2])),
        tokens=draw(st.sampled_from([None, None, 64, 300, 5000])) if is_trained else None,
        evaluated=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 3)),
        template=draw(st.sampled_from([*STYLES, *REAL]) | st.sampled_from([*STYLES])),
        export=draw(st.sampled_from([None, "model", "gguf"])),
        costs=draw(st.sampled_from([False] * 19 + [True])),  # half a minute a stage
    )


def _is_apart(first: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the second adapter cannot stay beside the first, or continue it."""
    return own["kind"] == "full" or own["kind"] != first["kind"] or own["kind"] in ("dora", "prefix")


def _adapters(architecture: str, dtype: str) -> st.SearchStrategy[dict[str, Any]]:
    kinds = ["lora", "lora", "full", "dora"] + ["qlora", "qlora"] * (architecture not in WITH_EXPERTS)
    chain = st.sampled_from(["merge", "stack", "continue"])
    low_rank = st.fixed_dictionaries({"kind": st.sampled_from(kinds), "rank": st.just(4), "chain": chain})
    masters = st.just(True) if dtype == "float32" else st.booleans()  # without, float32 saves nothing and is refused
    full = st.fixed_dictionaries({"kind": st.just("full"), "master_weights": masters})
    return low_rank.flatmap(lambda drawn: full if drawn["kind"] == "full" else st.just(drawn))


@st.composite
def _rows(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A few rows of a file that is here, from anywhere in it."""
    file = draw(st.sampled_from([file for file in FILES[kind] if file.exists()]))
    return {
        "file": str(file),
        "start": draw(st.integers(0, 200)),
        "number": draw(st.one_of(st.integers(2, 12), st.integers(2, 40))),
        "skips": draw(st.booleans()),
        "characters": draw(st.lists(st.sampled_from([1, 2, 40, 400]), min_size=1, max_size=5)),
    }


@st.composite
def _settings(draw: st.DrawFn, kind: str, adapter: dict[str, Any], *, has_reward: bool) -> dict[str, Any]:
    optim: dict[str, Any] = {
        "lr": draw(st.sampled_from([1e-4, 1e-3])),
        "batch_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "micro_batch_tokens": draw(st.sampled_from([64, 200, 700, 2048])),
        "activation_checkpointing": draw(st.sampled_from([False, False, True])),
    }
    settings: dict[str, Any] = {"optim": optim, "save_every": 1}
    limits: dict[str, Any] = {"too_long": {"do": "cut", "max_share": 1.0}}
    if kind == "ppo":
        return settings | limits | draw(_of_ppo(optim, has_reward=has_reward))
    optim |= {"max_steps": draw(st.integers(1, 4)), "warmup_ratio": 0.0, "epochs": 4}
    settings["max_length"] = draw(st.sampled_from([160, 512, 2048]))
    if settings["max_length"] == 2048:
        limits["too_long"]["do"] = draw(st.sampled_from(["cut", "drop"]))
    if kind in ("sft", "cpt"):
        settings["packing"] = draw(st.booleans())
    if kind != "cpt":
        settings |= limits
    if kind == "reward":
        settings |= {"eval_fraction": 0.0, "center_coefficient": draw(st.sampled_from([0.0, 0.01]))}
    if kind == "dpo":
        settings |= draw(_of_dpo())
    if kind == "kto":
        settings |= {
            "loss": draw(st.sampled_from(["kto", "apo_zero_unpaired"])),
            "precompute_reference": draw(st.booleans()),
        }
    return settings


@st.composite
def _of_dpo(draw: st.DrawFn) -> dict[str, Any]:
    loss = draw(st.sampled_from(["sigmoid", "sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "simpo", "orpo"]))
    settings: dict[str, Any] = {"loss": loss}
    if loss not in ("simpo", "orpo"):
        settings["precompute_reference"] = draw(st.booleans())
    if loss == "robust" or (loss == "sigmoid" and draw(st.booleans())):
        settings["label_smoothing"] = 0.1
    if loss == "sigmoid" and draw(st.booleans()):
        settings["nll_weight"] = 0.5
    return settings


@st.composite
def _of_ppo(draw: st.DrawFn, optim: dict[str, Any], *, has_reward: bool) -> dict[str, Any]:
    advantage = draw(st.sampled_from(["gae", "rloo", "grpo", "dr_grpo"]))
    group = draw(st.sampled_from([1, 2])) if advantage == "gae" else draw(st.sampled_from([2, 4]))
    minibatches = draw(st.sampled_from([1, 2]))
    optim["batch_size"] = group * draw(st.sampled_from([2, 4])) * minibatches
    settings: dict[str, Any] = {
        "advantage": advantage,
        "completions_per_prompt": group,
        "num_minibatches": minibatches,
        "ppo_epochs": draw(st.sampled_from([1, 2])),
        "updates": draw(st.integers(1, 3)),
        "max_new_tokens": draw(st.sampled_from([1, 8, 24])),
        "max_prompt_length": draw(st.sampled_from([64, 1024])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "critic": draw(st.sampled_from(["separate", "shared"])) if advantage == "gae" else "none",
        "scorers": [{"source": "length", "target": draw(st.sampled_from([4, 400]))}],
    }
    if has_reward:
        settings["scorers"] = [{"source": "reward"}, *settings["scorers"] * draw(st.booleans())]
    else:
        settings["reward"] = None
    if advantage != "gae":
        settings |= {"kl": {"apply_to": draw(st.sampled_from(["reward", "loss"]))}, "drop_ties": draw(st.booleans())}
    return settings
