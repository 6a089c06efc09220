"""Notes on a plan that is valid but questionable, and on results whose own figures cast doubt on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.config.model import NEW_TOKENS, AdapterKind, Dtype
from alignment.config.optim import is_automatic
from alignment.config.scoring import ScoreSourceConfig
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.artifacts import EVALUATION, REPORT, ROWS, read_manifest
from alignment.core.errors import ArtifactError
from alignment.core.model_files import is_adapter, weights_size
from alignment.data.overlap import HeldOut, LocatedText, Overlap
from alignment.job import memory_key
from alignment.pipeline.backends import feasibility, slurm
from alignment.pipeline.execute.stored_results import not_reused
from alignment.pipeline.plan import references, row_counts, settings
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.pipeline.plan.references import BASE
from alignment.pipeline.plan.row_counts import VALIDATION_DATA, labels_of, most_rows_of, validation_of
from alignment.pipeline.sources.peft_adapters import doubt, read_adapter
from alignment.records import training
from alignment.records.evaluation import Evaluation
from alignment.report import doubts
from alignment.report.kit import text
from alignment.rewards.scorer_sources import GRADE, REWARD, function_of
from alignment.stages import registry
from alignment.stages.base import Planned
from alignment.stages.registry import as_trained, kind_of, rows_are_counted

HIGH_RATE = 1e-2
"""Above the rates of published recipes, those of LoRA too (chosen, not tuned)."""


def of_plan(plan: Plan) -> list[str]:
    """A sentence for each note on the plan."""
    notes = [f"this is {doubts.SMOKE}"] if doubts.is_smoke(plan.profile) else []
    if plan.dropped_gates:
        notes.append(f"profile={plan.profile} drops the gates of {text.listing(list(plan.dropped_gates))}")
    notes += _unread(plan)
    if warning := frozen_rows(plan):
        notes.append(warning)
    notes += _adapters_from_outside(plan)
    notes += _slow_format(plan)
    weights = weights_size(plan.base.folder) if plan.base.folder and plan.base.ready else None
    for stage in plan.stages:
        trained = as_trained(stage.config)
        planned = Planned(
            folder=plan.run_folder / stage.name,
            has_to_run=stage.has_to_run,
            labels={} if trained is None else labels_of(trained.data, stage.seen.get("data")),
            weights=weights,
        )
        notes += [f"{stage.name}: {note}" for note in kind_of(stage.config).notes(stage.config, planned)]
        notes += [*_high_rates(stage), *_small_data(stage), *_near_held_out(stage)]
    return [*notes, *_left_out(plan), *cautions(plan)]


def _adapters_from_outside(plan: Plan) -> Iterator[str]:
    for ref, source in plan.sources.items():
        if source.folder is not None and is_adapter(source.folder):
            unsure = doubt(read_adapter(source.folder, where=ref), plan.base)
            yield f"{ref} is an adapter on {plan.base.source}{f', although {unsure}' if unsure else ''}"


def _unread(plan: Plan) -> Iterator[str]:
    for path in plan.unread_files:
        yield f"{path} is not read: a shipped file has its name; to use yours, rename it"
    yield from settings.unread_sentences(plan.unread_settings)


def advice(plan: Plan) -> list[str]:
    """What the recipe lacks, as sentences for whoever plans or runs it; trials of a sweep do not repeat them."""
    makes = {stage.name: kind_of(stage.config).produces for stage in plan.stages}
    evaluations = [name for name, artifact in makes.items() if artifact == EVALUATION]
    if not evaluations or REPORT in makes.values():
        return []
    report = next(kind for kind in registry.kinds().values() if kind.produces == REPORT)
    shown = [references.stage_of(slot) for slot in references.slots(report.config())]
    of = "" if set(shown) & set(evaluations) else f', evaluation: "stage:{evaluations[-1]}"'
    return [f"no stage writes a report; to get one, add `{report.name}: {{kind: {report.name}{of}}}` to stages"]


def on_a_plan(plan: Plan) -> list[str]:
    """The notes and the advice that somebody who plans a run gets."""
    models = (plan.base, *plan.sources.values()) if not_reused(plan.stages) else ()
    missing = [model for model in models if not model.ready]
    downloads = [f"the run will download the model {source}" for source in dict.fromkeys(m.source for m in missing)]
    return [*of_plan(plan), *downloads, *_jobs_without_requests(plan), *advice(plan)]


def _jobs_without_requests(plan: Plan) -> Iterator[str]:
    submission = slurm.submission(plan.config.launch)
    if submission is None or not not_reused(plan.stages):
        return
    requests = {"gpus": ("GPU", "1", submission.gpus), "time": ("time", "4:00:00", submission.time)}
    missing = {name: (words, value) for name, (words, value, given) in requests.items() if not given}
    if missing:
        words = " and no ".join(words for words, _ in missing.values())
        settings = " ".join(f"launch.backend.{name}={value}" for name, (_, value) in missing.items())
        yield f"the jobs ask Slurm for no {words}, so its defaults apply; ask with, for example, {settings}"


def of_stage(plan: Plan, stage: PlannedStage) -> list[str]:
    """What a stage that has to run will read, run and choose, and what the run requires of its result; each is the end
    of a sentence that begins with its name."""
    required = row_counts.gates_in_words(stage.config)
    if not stage.has_to_run:
        return required
    missing = ", which the run will download"
    remarks = [f"reads {source.identity}{'' if source.path else missing}" for source in stage.hub_data]
    remarks += [f"reads the rows of {maker}, which has no result yet" for maker in stage.unmade]
    remarks += [f"runs your code: {function}" for function in stage.user_code]
    if is_automatic(stage.config):
        key = memory_key(stage.config, stage.identity, stage.inputs)
        sizes = training.remembered(training.cache_file(plan.output / "artifacts", key), key)
        chosen = "; ".join(f"{size.tokens:,} tokens on {size.machine} ({size.launch})" for size in sizes)
        remark = "will choose optim.micro_batch_tokens before its first step"
        remarks.append(f"{remark}: so far {chosen}" if chosen else remark)
    return [*remarks, *required]


def cautions(plan: Plan) -> list[str]:
    """The notes that speak against an evaluation: prompts that are also trained on, a metric that is."""
    return [*_shared_prompts(plan), *_learned_metrics(plan)]


def _learned_metrics(plan: Plan) -> Iterator[str]:
    """Notes on primary metrics that stages learn from, or that choose their policy: those scores were optimised."""
    for evaluation in plan.stages:
        metric = kind_of(evaluation.config).display.primary(evaluation.config)
        if metric is None:
            continue
        for stage in plan.stages:
            kind = kind_of(stage.config)
            if not (kind.trains or kind.produces == ROWS):  # it neither trains nor selects what others train on
                continue
            fields = [
                field
                for field, scorer in kind_of(stage.config).scorers(stage.config).items()
                if _scores_of(scorer, stage.config) == _scores_of(metric, evaluation.config)
            ]
            if fields:
                yield (
                    f"{evaluation.name} judges by {metric.name}, which {stage.name} optimises ({fields[0]}): a "
                    f"better score may only exploit gaps in that metric, so check another metric too"
                )


def _scores_of(source: ScoreSourceConfig, config: StageConfig) -> tuple[Any, ...]:
    """What gives these scores: equal for two sources that score alike. ``reward`` is the model that its stage names. Of
    a server or a grader the model counts, whatever it is asked."""
    name = getattr(config, REWARD, None) if source.source == REWARD else source.source
    served = source.server.model if source.server is not None else ""
    if source.source == GRADE:
        grader = getattr(source, "grader", None) or getattr(config, "grader", None)
        served = grader.endpoint.model if grader is not None else ""
    return str(function_of(name or "") or name), source.pattern, source.target, source.schema, served


def _slow_format(plan: Plan) -> Iterator[str]:
    waits = any(stage.has_to_run and kind_of(stage.config).run for stage in plan.stages)
    on_cpu = not feasibility.devices_for(plan.config.launch)
    if waits and on_cpu and plan.config.model.dtype is Dtype.bfloat16 and not hardware.has_bfloat16():
        yield (
            "this processor has no bfloat16 instructions, so matrix products take about three times as long as in "
            "float32; model.dtype=float32 is faster here"
        )


def _high_rates(stage: PlannedStage) -> Iterator[str]:
    config = as_trained(stage.config)
    if config is None:
        return
    optim = config.optim
    for name in ("lr", "critic_lr"):
        rate = getattr(optim, name, None)
        if rate is not None and rate > HIGH_RATE:
            yield f"stages.{stage.name}.optim.{name} is {rate:g}: above {HIGH_RATE:g}, nearly every model diverges"


def _small_data(stage: PlannedStage) -> Iterator[str]:
    config = as_trained(stage.config)
    if config is None or not rows_are_counted(config):
        return
    rows = most_rows_of(config.data, stage.seen.get("data"))
    if rows is not None and rows < config.optim.batch_size:
        yield (
            f"stages.{stage.name}.optim.batch_size is {config.optim.batch_size}, but there are only {rows} rows, so "
            "each step uses all of them"
        )


def _left_out(plan: Plan) -> Iterator[str]:
    fields: dict[tuple[str, int, bool], list[str]] = {}
    for stage in plan.stages:
        for field, seen in stage.seen.items():
            for reason, count in seen.set_aside:
                fields.setdefault((reason, count, seen.whole), []).append(f"stages.{stage.name}.{field}")
    for (reason, count, whole), names in fields.items():
        among = "" if whole else " that the plan reads"
        rows, are = ("row", "is") if count == 1 else ("rows", "are")
        yield f"{text.listing(names)}: {count} {rows}{among} {are} left out: {reason}"


def _near_held_out(stage: PlannedStage) -> Iterator[str]:
    learned, held_out = stage.seen.get("data"), stage.seen.get(VALIDATION_DATA)
    if learned is None or held_out is None:
        return
    both = list(HeldOut(held_out.texts).overlaps(learned.texts))
    if both:
        yield (
            f"{_resembling(len(both), 'possible training row', f'of {stage.name}')} its validation rows: "
            f"{both[0].learned} has {both[0].share:.0%} of the eight-word sequences of {both[0].held_out}; its "
            f"validation loss may be too low"
        )


def _shared_prompts(plan: Plan) -> Iterator[str]:
    for evaluation in plan.stages:
        if kind_of(evaluation.config).produces != EVALUATION or "data" not in evaluation.seen:
            continue
        held_out = HeldOut(evaluation.seen["data"].texts)
        for both, stages in _overlaps(plan, held_out).items():
            yield _resemble(f"that {text.listing(stages)} may learn from", both, evaluation)
        for stage in plan.stages:
            validation, own = validation_of(stage.config), stage.seen.get(VALIDATION_DATA)
            if validation is None or own is None or not (validation.keep_best or validation.patience):
                continue
            if both := tuple(held_out.overlaps(own.texts)):
                yield _resemble(f"by which {stage.name} chooses its step", both, evaluation)


def _resemble(which: str, both: Sequence[Overlap], evaluation: PlannedStage) -> str:
    return (
        f"{_resembling(len(both), 'row', which)} prompts of {evaluation.name}: {both[0].learned} has "
        f"{both[0].share:.0%} of the eight-word sequences of {both[0].held_out}"
    )


def _resembling(count: int, noun: str, which: str) -> str:
    return f"1 {noun} {which} resembles" if count == 1 else f"{count} {noun}s {which} resemble"


def _overlaps(plan: Plan, held_out: HeldOut) -> dict[tuple[Overlap, ...], list[str]]:
    overlaps: dict[tuple[LocatedText, ...], tuple[Overlap, ...]] = {}
    stages: dict[tuple[Overlap, ...], list[str]] = {}
    for stage in plan.stages:
        learned = [seen for field, seen in stage.seen.items() if not field.startswith(VALIDATION_DATA)]
        for seen in learned if kind_of(stage.config).trains else ():
            if seen.texts not in overlaps:
                overlaps[seen.texts] = tuple(held_out.overlaps(seen.texts))
            names = stages.setdefault(overlaps[seen.texts], [])
            names += [] if stage.name in names else [stage.name]
    return {both: names for both, names in stages.items() if both}


def of_result(kind: str, artifact: Path) -> list[str]:
    """Doubts that a stage's own figures cast on its result; empty if there is no result."""
    if registry.produced_by(kind) == EVALUATION:
        try:
            return doubts.of_evaluation(Evaluation.read(artifact))
        except FileNotFoundError:
            return []
    try:
        manifest = read_manifest(artifact)
    except ArtifactError:  # a stage that uses the artifact reports the damage
        return []
    return [] if manifest is None else registry.doubts(kind, manifest.metrics)


def frozen_rows(plan: Plan) -> str | None:
    """A warning if a stage starts from a base with added tokens and does not train their rows; otherwise None."""
    file = None if plan.base.folder is None else plan.base.folder / NEW_TOKENS
    if file is None or not file.is_file():
        return None
    tokens = ", ".join(json.loads(file.read_text(encoding="utf-8")))
    for stage in plan.stages:
        config = as_trained(stage.config)
        if config is None or config.init != BASE or not stage.has_to_run:
            continue
        names = config.adapter.modules_to_save
        has_embeddings = any("embed" in name or name.endswith("wte") for name in names)
        if config.adapter.kind is not AdapterKind.full and not has_embeddings:
            return (
                f"{stage.name} does not train the rows of the new tokens {tokens}: these stay the mean of all other "
                f"rows; set stages.{stage.name}.adapter.modules_to_save=[embed_tokens] (or this model's name for it), "
                "or adapter=full"
            )
    return None
