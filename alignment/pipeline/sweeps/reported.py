"""What each kind of stage writes into its manifest, so that an objective which no stage reports is refused before the
first trial and not after it."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.config.did_you_mean import suggestion
from alignment.config.stage import (
    CptConfig,
    DpoConfig,
    EvaluateConfig,
    ForgettingConfig,
    PpoConfig,
    ReportConfig,
    RewardCardConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
)
from alignment.evaluation.arm_labels import labels
from alignment.evaluation.house_style import METRICS

_ROWS = ("rows", "rows_too_long", "rows_cut")
_LESS_IS_BETTER = ("loss", "eval_loss", "log_loss", "brier", "ece", "objective/kl", "guard/kl")
_LESS_IS_BETTER_OF = ("loss/", "perplexity/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """Figures by name. ``training`` ones come from the rows that the stage learns from; ``families`` are beginnings of
    names that go on in several ways."""

    held_out: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that are known by their whole name."""
        return (*self.held_out, *self.training, *self.counts)

    def __contains__(self, metric: str) -> bool:
        return metric in self.names or metric.startswith(self.families)


def of_stage(config: StageConfig) -> Reported:
    """What a stage with these settings writes into its manifest."""
    match config:
        case CptConfig() | SftConfig():
            return Reported(training=("loss",), counts=_ROWS)
        case RewardConfig():
            return _of_reward(config)
        case DpoConfig():
            return Reported(training=("loss", "rewards/accuracies", "rewards/margins"), counts=_ROWS)
        case PpoConfig():
            training = ("objective/score", "objective/kl", "response_length", "eos_rate")
            families = ("guard/",) if config.guard.every else ()
            return Reported(training=training, counts=(*_ROWS, "updates", "memory/base_copies"), families=families)
        case EvaluateConfig():
            names = tuple(metric.name for metric in METRICS)
            return Reported(held_out=_of_arms((*names, "loss", "win_rate"), config.arms))
        case ForgettingConfig():
            return Reported(held_out=("passed", *_of_arms(("perplexity", "ability"), ["base", *config.arms])))
        case RewardCardConfig():
            named = ("accuracy", "ece", "brier", "log_loss")
            return Reported(held_out=named, counts=("pairs",), families=("accuracy/",))
        case ReportConfig():
            return Reported()


def _of_arms(figures: tuple[str, ...], arms: list[str]) -> tuple[str, ...]:
    return tuple(f"{figure}/{label}" for figure in figures for label in labels(arms).values())


def _of_reward(config: RewardConfig) -> Reported:
    held_out = ("eval_accuracy", "eval_loss", "eval_margin", "eval_length_rule_accuracy")
    counts = (*_ROWS, "score_offset")
    if not config.eval_fraction:
        return Reported(counts=counts)
    return Reported(held_out=held_out, counts=(*counts, "eval_rows"))


def missing(config: StageConfig, metric: str, stage: str) -> str:
    """Why a stage with these settings never reports a metric; nothing where it does."""
    known = of_stage(config)
    if metric in known:
        return ""
    if isinstance(config, RewardConfig) and not config.eval_fraction and metric.startswith("eval_"):
        return f"stage {stage!r} reports no {metric!r} without held-out pairs; set stages.{stage}.eval_fraction above 0"
    if isinstance(config, PpoConfig) and metric.startswith("guard/"):
        return f"stage {stage!r} reports no {metric!r} without a guard; set stages.{stage}.guard.every above 0"
    every = [*known.names, *(f"{family}…" for family in known.families)]
    if not every:
        return f"stage {stage!r} reports no figure; take the evaluation's, by arm: …"
    return f"stage {stage!r} reports no {metric!r}; {suggestion(metric, every)}"


def less_is_better(metric: str) -> bool:
    """Whether a larger figure is a worse one."""
    return metric in _LESS_IS_BETTER or metric.startswith(_LESS_IS_BETTER_OF)
