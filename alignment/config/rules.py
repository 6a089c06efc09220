"""What values are allowed, beyond their type: one table, one line a field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig, MixedConfig, SourceConfig
from alignment.config.evaluation import EndpointConfig, FewShotConfig, JudgeConfig
from alignment.config.guard import GuardConfig
from alignment.config.launch import LaunchConfig, SlurmConfig
from alignment.config.optim import OptimConfig
from alignment.config.run import RunConfig
from alignment.config.scorers import ScorerConfig
from alignment.config.stage import (
    CptConfig,
    DpoConfig,
    EvaluateConfig,
    ForgettingConfig,
    KlConfig,
    PpoConfig,
    PpoOptimConfig,
    PtxConfig,
    ReportConfig,
    RewardCardConfig,
    RewardConfig,
    SftConfig,
)
from alignment.config.sweep import ObjectiveConfig, ParameterConfig, PruningConfig, SweepConfig
from alignment.config.too_long import TooLongConfig
from alignment.config.tracking import TrackingConfig

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def is_name(value: str) -> bool:
    """Whether ``value`` may name a run or a stage: it becomes a folder's name and a word in commands."""
    return _NAME.fullmatch(value) is not None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """A test of a value that has the right type already, and what it allows, in words.

    A wrong value of a ``secret`` rule may hold a key or a password, and is not repeated.
    """

    holds: Callable[[Any], bool]
    allowed: str
    secret: bool = False


LARGEST = 1e6
"""A score, and what it is multiplied by or less: float32 tells scores of this size apart by .06, and holds the squared
errors of a value function for them, summed over any batch. Beyond it a loss would become infinite."""

NAME = Rule(is_name, "1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot")
FILLED = Rule(lambda value: bool(value), "at least one entry")
POSITIVE = Rule(lambda value: value > 0 and math.isfinite(value), "a number above 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0 and math.isfinite(value), "0 or more")
FINITE = Rule(lambda value: math.isfinite(value), "a finite number")
SCORE = Rule(lambda value: abs(value) <= LARGEST, f"from -{LARGEST:g} to {LARGEST:g}")
PENALTY = Rule(lambda value: 0 <= value <= LARGEST, f"from 0 to {LARGEST:g}")
FRACTION = Rule(lambda value: 0 <= value <= 1, "from 0 to 1")
PATTERN = Rule(lambda value: _compiles(value), "a regular expression as Python writes them")
BETWEEN = Rule(lambda value: 0 < value < 1, "above 0 and below 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "from 0 to below 1")
PORT = Rule(lambda value: 0 < value < 65536, "a port from 1 to 65535")
SLURM_WORD = Rule(
    lambda value: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._,-]{0,127}", value) is not None,
    "1 to 128 of A-Z a-z 0-9 . _ , -, beginning with a letter, a digit or _",
)
SLURM_TIME = Rule(
    lambda value: re.fullmatch(r"(\d{1,3}-)?\d{1,4}:[0-5]\d:[0-5]\d", value, re.ASCII) is not None,
    "hours:minutes:seconds as in '4:00:00', after days as in '2-12:00:00'",
)
SLURM_MEMORY = Rule(
    lambda value: re.fullmatch(r"[1-9]\d{0,8}[KMGT]", value, re.ASCII) is not None,
    "a whole number with K, M, G or T, as in 64G",
)
TAGS = Rule(lambda value: all(0 < len(tag) <= 64 for tag in value), "tags of 1 to 64 characters")
PART = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
URL = Rule(
    lambda value: re.fullmatch(r"(https?://[^\s/@?#]+(/[^\s@?#]*)?)?", value) is not None,
    "http://HOST:PORT/PATH or https://…, without a key or a password in it (api_key_env names a variable)",
    secret=True,
)
VARIABLE = Rule(
    lambda value: re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value) is not None,
    "the name of an environment variable, in capitals; never the key itself",
    secret=True,
)

RULES: dict[tuple[type, str], Rule] = {
    (RunConfig, "name"): NAME,
    (RunConfig, "seed"): NOT_NEGATIVE,
    (RunConfig, "stages"): FILLED,
    (RunConfig, "output"): FILLED,
    (LaunchConfig, "num_processes"): NOT_NEGATIVE,
    (LaunchConfig, "num_machines"): POSITIVE,
    (LaunchConfig, "machine_rank"): NOT_NEGATIVE,
    (LaunchConfig, "main_address"): FILLED,
    (LaunchConfig, "main_port"): PORT,
    (LaunchConfig, "threads"): NOT_NEGATIVE,
    (LaunchConfig, "grace_seconds"): POSITIVE,
    (LaunchConfig, "hang_seconds"): NOT_NEGATIVE,
    (SlurmConfig, "partition"): SLURM_WORD,
    (SlurmConfig, "account"): SLURM_WORD,
    (SlurmConfig, "qos"): SLURM_WORD,
    (SlurmConfig, "time"): SLURM_TIME,
    (SlurmConfig, "gpus"): NOT_NEGATIVE,
    (SlurmConfig, "cpus"): POSITIVE,
    (SlurmConfig, "memory"): SLURM_MEMORY,
    (SlurmConfig, "signal_seconds"): POSITIVE,
    (TrackingConfig, "project"): NAME,
    (TrackingConfig, "entity"): NAME,
    (TrackingConfig, "group"): NAME,
    (TrackingConfig, "tags"): TAGS,
    (SourceConfig, "split"): FILLED,
    (SourceConfig, "subset"): FILLED,
    (SourceConfig, "limit"): POSITIVE,
    (SourceConfig, "max_skipped"): FRACTION,
    (DataConfig, "fraction"): PART,
    (MixedConfig, "share"): BETWEEN,
    (MixedConfig, "count"): POSITIVE,
    (AdapterConfig, "rank"): POSITIVE,
    (AdapterConfig, "alpha"): POSITIVE,
    (AdapterConfig, "dropout"): BELOW_ONE,
    (AdapterConfig, "target_modules"): FILLED,
    (AdapterConfig, "virtual_tokens"): POSITIVE,
    (OptimConfig, "lr"): POSITIVE,
    (OptimConfig, "batch_size"): POSITIVE,
    (OptimConfig, "micro_batch_tokens"): POSITIVE,
    (OptimConfig, "epochs"): POSITIVE,
    (OptimConfig, "max_steps"): POSITIVE,
    (OptimConfig, "warmup_ratio"): FRACTION,
    (OptimConfig, "weight_decay"): NOT_NEGATIVE,
    (OptimConfig, "adam_eps"): POSITIVE,
    (OptimConfig, "max_grad_norm"): POSITIVE,
    (PpoOptimConfig, "lr"): POSITIVE,
    (PpoOptimConfig, "critic_lr"): POSITIVE,
    (PpoOptimConfig, "batch_size"): POSITIVE,
    (PpoOptimConfig, "micro_batch_tokens"): POSITIVE,
    (PpoOptimConfig, "adam_eps"): POSITIVE,
    (PpoOptimConfig, "max_grad_norm"): POSITIVE,
    (KlConfig, "coefficient"): NOT_NEGATIVE,
    (KlConfig, "target"): POSITIVE,
    (KlConfig, "horizon"): POSITIVE,
    (ScorerConfig, "weight"): SCORE,
    (ScorerConfig, "clip"): POSITIVE,
    (ScorerConfig, "pattern"): PATTERN,
    (ScorerConfig, "target"): POSITIVE,
    (GuardConfig, "every"): NOT_NEGATIVE,
    (GuardConfig, "prompts"): POSITIVE,
    (GuardConfig, "max_kl"): POSITIVE,
    (PtxConfig, "coefficient"): NOT_NEGATIVE,
    (PtxConfig, "batch_size"): POSITIVE,
    (CptConfig, "max_length"): POSITIVE,
    (CptConfig, "log_every"): POSITIVE,
    (CptConfig, "save_every"): POSITIVE,
    (TooLongConfig, "max_share"): FRACTION,
    (SftConfig, "max_length"): POSITIVE,
    (SftConfig, "max_prompt_length"): POSITIVE,
    (SftConfig, "max_answer_length"): POSITIVE,
    (SftConfig, "log_every"): POSITIVE,
    (SftConfig, "save_every"): POSITIVE,
    (RewardConfig, "max_length"): POSITIVE,
    (RewardConfig, "max_prompt_length"): POSITIVE,
    (RewardConfig, "max_answer_length"): POSITIVE,
    (RewardConfig, "center_coefficient"): NOT_NEGATIVE,
    (RewardConfig, "eval_fraction"): BELOW_ONE,
    (RewardConfig, "log_every"): POSITIVE,
    (RewardConfig, "save_every"): POSITIVE,
    (DpoConfig, "max_length"): POSITIVE,
    (DpoConfig, "max_prompt_length"): POSITIVE,
    (DpoConfig, "max_answer_length"): POSITIVE,
    (DpoConfig, "beta"): POSITIVE,
    (DpoConfig, "log_every"): POSITIVE,
    (DpoConfig, "save_every"): POSITIVE,
    (PpoConfig, "scorers"): FILLED,
    (PpoConfig, "updates"): POSITIVE,
    (PpoConfig, "critic_warmup"): NOT_NEGATIVE,
    (PpoConfig, "max_approxkl"): POSITIVE,
    (PpoConfig, "completions_per_prompt"): POSITIVE,
    (PpoConfig, "ppo_epochs"): POSITIVE,
    (PpoConfig, "num_minibatches"): POSITIVE,
    (PpoConfig, "max_prompt_length"): POSITIVE,
    (PpoConfig, "max_new_tokens"): POSITIVE,
    (PpoConfig, "temperature"): POSITIVE,
    (PpoConfig, "gamma"): FRACTION,
    (PpoConfig, "gae_lambda"): FRACTION,
    (PpoConfig, "clip"): POSITIVE,
    (PpoConfig, "value_clip"): POSITIVE,
    (PpoConfig, "value_coefficient"): NOT_NEGATIVE,
    (PpoConfig, "missing_eos_penalty"): PENALTY,
    (PpoConfig, "save_every"): POSITIVE,
    (EvaluateConfig, "arms"): FILLED,
    (SweepConfig, "trials"): POSITIVE,
    (SweepConfig, "seed"): NOT_NEGATIVE,
    (SweepConfig, "parameters"): FILLED,
    (ObjectiveConfig, "arm"): FILLED,
    (ObjectiveConfig, "stage"): FILLED,
    (ObjectiveConfig, "metric"): FILLED,
    (PruningConfig, "startup_trials"): POSITIVE,
    (PruningConfig, "warmup_steps"): NOT_NEGATIVE,
    (ParameterConfig, "key"): FILLED,
    (ParameterConfig, "low"): FINITE,
    (ParameterConfig, "high"): FINITE,
    (EvaluateConfig, "max_new_tokens"): POSITIVE,
    (EvaluateConfig, "batch_size"): POSITIVE,
    (EvaluateConfig, "bootstrap_samples"): POSITIVE,
    (ForgettingConfig, "max_perplexity_rise"): NOT_NEGATIVE,
    (ForgettingConfig, "max_ability_drop"): FRACTION,
    (ForgettingConfig, "bootstrap_samples"): POSITIVE,
    (ReportConfig, "num_samples"): POSITIVE,
    (RewardCardConfig, "max_length"): POSITIVE,
    (RewardCardConfig, "micro_batch_tokens"): POSITIVE,
    (RewardCardConfig, "invariance_pairs"): NOT_NEGATIVE,
    (RewardCardConfig, "bootstrap_samples"): POSITIVE,
    (RewardCardConfig, "num_worst"): NOT_NEGATIVE,
    (FewShotConfig, "count"): POSITIVE,
    (JudgeConfig, "max_prompts"): POSITIVE,
    (JudgeConfig, "max_invalid"): FRACTION,
    (EndpointConfig, "base_url"): URL,
    (EndpointConfig, "criteria"): FILLED,
    (EndpointConfig, "max_tokens"): POSITIVE,
    (EndpointConfig, "api_key_env"): VARIABLE,
    (EndpointConfig, "timeout"): POSITIVE,
    (EndpointConfig, "retries"): NOT_NEGATIVE,
    (EndpointConfig, "concurrency"): POSITIVE,
}


def rule_of(cls: type, name: str) -> Rule | None:
    """The rule of a field of the class or of one that it derives from."""
    return next((RULES[base, name] for base in cls.__mro__ if (base, name) in RULES), None)
