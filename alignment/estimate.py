"""Runs stages on shadows to see what they would need: ``python -m alignment.estimate FOLDER``. Every stage does what it
would do, with tensors that have no numbers (alignment/costs/shadows.py), on its first rows and for a few steps. Its
result is an artifact whose weights are missing, from which later stages start. ``--device`` names a GPU of
alignment/costs/devices.py; else the machine's own operations are timed."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, as in a stage
    from alignment.core import child_processes

    child_processes.hide()

import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import shutil
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging as transformers_logging

from alignment.config.data import DataConfig
from alignment.config.launch import Engine, Offload, RolloutSamplingConfig, SamplingConfig, Sharding
from alignment.config.model import AdapterKind
from alignment.config.optim import DEFAULT_TOKENS, OptimConfig, is_automatic, with_tokens
from alignment.core import child_processes, hardware
from alignment.core.child_processes import end_process
from alignment.core.errors import AlignmentError
from alignment.costs.devices import AMX_CODE_BYTES, CODE_BYTES, CONTEXT_BYTES, DEVICES, RUNTIME_BYTES, THIS, seconds_on
from alignment.costs.op_times import NEAR_BYTES, alike, bytes_of, flop_of, seconds_of
from alignment.costs.recorder import ACTIVATIONS, CACHE, LOGITS, Operations, Phase, Recorder
from alignment.costs.remedies import Way, with_remedy, with_settings
from alignment.costs.repeats import (
    BEFORE,
    DIVIDED,
    OFFLOADED,
    STEP_ROWS,
    Repeats,
    divided,
    repeats_of,
    seconds_a_byte,
    without,
)
from alignment.costs.shadows import Key, Operation
from alignment.data.reading import fewer_of, times_as_many
from alignment.job import StageSpec
from alignment.models.kernels.row_attention import forget_plans
from alignment.records.cost import ASKED, FILE, PROGRESS, PhaseCost, RunCost, StageCost
from alignment.stages.registry import kind_of, read_spec
from alignment.training.checkpoints import NUM_STORED
from alignment.training.context import StageContext
from alignment.worker import function_of, publish_result

STARTING, LEARNING, OPTIMISING, SAVING = "starting", "training", "optimising", "saving"
TRYING = "trying the longest batch"
SAMPLING, ANSWERING, VALIDATING = "sampling", "answering", "validating"
CHANGING = (ACTIVATIONS, CACHE, LOGITS)
"""What has the sizes of rows."""
ONCE = {TRYING, SAVING, *BEFORE}
"""Phases that a stage goes through once, however many rows it has."""
BETWEEN_SECONDS = 1e-5
"""Of Python and autograd for each operation on a CPU: chosen by what two stages took beyond their operations
(docs/LOG.md, 2026-11-28)."""
EXPECTED_FLOPS, EXPECTED_BANDWIDTH = 3e11, 5e9
"""By which the operations are chosen that are timed: of two cores, roughly."""
TIMED_SHARE = 0.997
"""Of the expected time of a phase, which operations are timed that make it up: 3 of 5 of the quickstart. Leaving out
.2 % changed times by .3 to .6 %, .5 % by .8 to 1.4 % (docs/LOG.md, 2026-12-02)."""
HOLES = 0.25
"""Of activations, cache and logits: what a stage that learns from sampled answers holds beside them, because their
lengths change from update to update and leave holes in the heap. Chosen by PPO and GRPO with five adapters and by the
quickstart (docs/costs.md)."""
ROWS = 1000
"""Rows that a stage which trains reads."""
FEW_ROWS = 16
"""Rows that another stage reads at least, which does the same with each."""


def main() -> int:
    """Writes the costs of all stages; one that cannot be estimated has an error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.estimate", description=__doc__)
    parser.add_argument("folder", type=Path, help="where asked.json is, and cost.json and results of stages will be")
    parser.add_argument("--device", default=THIS, choices=[THIS, *DEVICES])
    parser.add_argument(
        "--memory", type=float, default=0.0, help="bytes of memory; settings are searched with which the stages fit"
    )
    parser.add_argument(
        "--as-run", action="store_true", help="try the longest micro-batch only for stages that would do so in a run"
    )
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    asked = json.loads((options.folder / ASKED).read_text(encoding="utf-8"))
    for one_stage in asked:
        function_of(kind_of(read_spec(Path(one_stage["file"])).config))  # imports what the stage needs
    child_processes.show()
    gc.freeze()  # each model and each trainer collects garbage first, which takes long among the libraries' objects
    timer = Timer(options.device, tries_longest=not options.as_run)
    startup = timer.startup
    stages, trades = [], []
    began = time.monotonic()
    for number, one_stage in enumerate(asked):
        timer.processes = one_stage["processes"]
        timer.startup = startup if timer.processes > 1 else 0.0  # others find the libraries imported
        spec = _within(options.folder, one_stage["file"])
        left = (time.monotonic() - began) / number * (len(asked) - number) if number else 0.0
        words = f"; about {left:.0f} s left" if number else ""
        _announce(options.folder, f"estimating {spec.stage} ({number + 1} of {len(asked)}{words})")
        cost = cost_of(spec, timer, publishes=True)
        stages.append(_with_remedy(cost, one_stage["cheaper"], timer, options))
        trades += [_trade(cost, way, timer, options.folder) for way in one_stage["ways"]]
    cost_of_run = RunCost(
        device=options.device,
        memory=options.memory,
        startup=startup if any(one_stage["processes"] == 1 for one_stage in asked) else 0.0,
        stages=stages,
        trades=trades,
    )
    cost_of_run.write(options.folder / FILE)
    return 0


def _within(folder: Path, file: str) -> StageSpec:
    """The stage of a file with its result in ``folder``, like those of earlier stages that do not exist yet."""
    spec = read_spec(Path(file))

    def moved(path: Path | None) -> Path | None:
        if path is None or path.exists():
            return path
        for part in (path, path.parent):  # the rows of a stage are a file in its result
            if (folder / part.name).exists():
                return folder / part.name / path.relative_to(part)
        return path

    return replace(
        spec,
        artifact=folder / spec.artifact.name,
        work=folder / spec.work.name,
        inputs={name: replace(made, path=moved(made.path)) for name, made in spec.inputs.items()},
        arms={name: replace(made, path=moved(made.path)) for name, made in spec.arms.items()},
        data_path=moved(spec.data_path) or spec.data_path,
        extra_data={name: moved(path) or path for name, path in spec.extra_data.items()},
    )


def _with_remedy(
    cost: StageCost, ways: Sequence[Mapping[str, Any]], timer: Timer, options: argparse.Namespace
) -> StageCost:
    """The cost, with the settings that cost least of those with which the stage fits, if it does not by itself."""
    untimed = timer.without_times()

    def estimate(way: Way, settings: Mapping[str, Any]) -> StageCost:
        spec = _within(options.folder, way.file)
        tried = [f"stages.{spec.stage}.{field}={json.dumps(value)}" for field, value in settings.items()]
        _announce(options.folder, f"{spec.stage} does not fit; trying {' '.join([*way.overrides, *tried])}")
        return cost_of(replace(spec, config=with_settings(spec.config, settings)), untimed, publishes=False)

    return with_remedy(cost, [Way.from_plain(way) for way in ways], options.memory or math.inf, estimate)


def _announce(folder: Path, line: str) -> None:
    with (folder / PROGRESS).open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")


def _trade(cost: StageCost, way: Mapping[str, Any], timer: Timer, folder: Path) -> StageCost:
    if way["file"] is None:
        tried = StageCost(stage=cost.stage, kind=cost.kind, error="not allowed with the other settings of the recipe")
    else:
        tried = cost_of(_within(folder, way["file"]), timer, publishes=False)
    return replace(tried, adapter=way["name"], remedy=list(way["overrides"]))


class Timer:
    """How stages are estimated, and seconds of operations on a device, of which equal ones are timed once. ``fixed``
    are the bytes that a process takes there before it has a model, and ``startup`` the seconds."""

    def __init__(self, device: str, *, tries_longest: bool = True, processes: int = 1) -> None:
        self.tries_longest = tries_longest
        self.processes = processes
        self.is_gpu = device != THIS
        self.fixed = int(CONTEXT_BYTES) if self.is_gpu else psutil.Process().memory_info().rss
        self.between = 0.0 if self.is_gpu else BETWEEN_SECONDS
        self.startup = 0.0 if self.is_gpu else time.time() - psutil.Process().create_time()
        self._device = DEVICES.get(device)
        self._seconds: dict[tuple[Hashable, bool], tuple[float, float]] = {}
        self._seconds_a_byte: float | None = None
        self._counts_time = True

    def without_times(self) -> Timer:
        """The same device, on which nothing takes time: for memory alone no operation has to be timed."""
        other = copy.copy(self)
        other._counts_time = False
        return other

    def seconds(self, operations: Mapping[Key, tuple[Operation, float]]) -> dict[Key, float]:
        """Seconds of one run of each; with it comes what the stage moves from one run of its function to the next. On a
        CPU, of operations on tensors of nearly the same sizes one is timed, and the others by their bytes."""
        if not self._counts_time:
            return dict.fromkeys(operations, 0.0)
        alikes = {
            key: (key if self.is_gpu else alike(operation), bytes_between < NEAR_BYTES)
            for key, (operation, bytes_between) in operations.items()
        }
        new = {known: operations[key] for key, known in alikes.items() if known not in self._seconds}
        for known, (operation, _), seconds in zip(new, new.values(), self._measured([*new.values()]), strict=True):
            self._seconds[known] = seconds, bytes_of(operation)
        return {key: self._by_bytes(known, operations[key][0]) for key, known in alikes.items()}

    def _by_bytes(self, known: tuple[Hashable, bool], operation: Operation) -> float:
        seconds, of_bytes = self._seconds[known]
        return seconds if not of_bytes else seconds * bytes_of(operation) / of_bytes

    def seconds_to_store(self, size: float, folder: Path) -> float:
        """Seconds in which this machine stores so many bytes near ``folder``; 0 for a GPU, whose disk is unknown."""
        if self.is_gpu or not size or not self._counts_time:
            return 0.0
        if self._seconds_a_byte is None:
            self._seconds_a_byte = seconds_a_byte(folder.parent)
        return size * self._seconds_a_byte

    def _measured(self, operations: Sequence[tuple[Operation, float]]) -> list[float]:
        if self._device is None:
            return seconds_of(operations)
        device = self._device
        return [seconds_on(device, flop=flop_of(operation), moved=bytes_of(operation)) for operation, _ in operations]


def cost_of(spec: StageSpec, timer: Timer, *, publishes: bool) -> StageCost:
    """What the stage would need; if it ``publishes``, its result is there for later stages."""
    described: dict[str, Any] = {"stage": spec.stage, "kind": spec.config.kind, "adapter": _adapter_of(spec)}
    if server := next(_servers(spec.config), None):
        return StageCost(**described, error=f"it calls the server at {server}, and a plan makes no such calls")
    recorder = Recorder(for_gpu=timer.is_gpu, tries_longest=timer.tries_longest)
    function = function_of(kind_of(spec.config))
    try:
        _run(_as_estimated(spec), recorder, function, publishes=publishes)
    except AlignmentError as error:
        return StageCost(**described, error=str(error))
    except Exception as error:  # noqa: BLE001 - a stage that cannot run on shadows must not hide the others
        traceback.print_exc()
        return StageCost(**described, error=f"{type(error).__name__}: {error}")
    repeats = repeats_of(spec.config, _times_as_many(spec))
    phases = _phases(recorder, timer, repeats)
    phases = {name: divided(name, phase, recorder, spec.sharding, timer.processes) for name, phase in phases.items()}
    result = recorder.trained_bytes + recorder.copied_bytes
    stored = result + _checkpoints_written(spec, recorder, repeats) * _checkpoint_bytes(recorder)
    phases[SAVING] = replace(phases[SAVING], seconds=phases[SAVING].seconds + timer.seconds_to_store(stored, spec.work))
    on_host = [phases.pop(name) for name in BEFORE if name in phases] if timer.is_gpu else []
    moved = [part for part in OFFLOADED[spec.offload] if part in DIVIDED[spec.sharding]] if timer.is_gpu else []
    on_device = {name: without(moved, phase) for name, phase in phases.items()}
    offloaded = [phase.peak - on_device[name].peak for name, phase in phases.items()]
    return StageCost(
        **described,
        phases=on_device,
        host=max([0, *(phase.peak for phase in on_host), *offloaded]),
        fixed=timer.fixed,
        result=result,
        checkpoints=(NUM_STORED + 1) * _checkpoint_bytes(recorder),  # the last is being written
        steps=round(recorder.all_steps * repeats.of_steps),
        tokens=recorder.mean_tokens * recorder.all_steps * repeats.steps,
        trained=recorder.trained,
        weights=recorder.weights,
        first_rows=_rows_read(spec) if repeats.is_unknown else 0,
        assumed_tokens=DEFAULT_TOKENS if is_automatic(spec.config) else 0,
    )


def _checkpoint_bytes(recorder: Recorder) -> int:
    return recorder.trained_bytes + recorder.moments


def _checkpoints_written(spec: StageSpec, recorder: Recorder, repeats: Repeats) -> int:
    save_every: int | None = getattr(spec.config, "save_every", None)
    if save_every is None:
        return 0
    periods = recorder.all_steps / recorder.period * repeats.of_steps / repeats.learning
    return math.ceil(periods / save_every)


def _adapter_of(spec: StageSpec) -> str:
    if spec.adapter is None:
        return ""
    bare = spec.adapter.kind is AdapterKind.full and not spec.adapter.master_weights
    return "full without masters" if bare else spec.adapter.kind.value


def _servers(settings: Any) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "base_url" and value:
            yield value
        for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else (value,):
            if dataclasses.is_dataclass(part):
                yield from _servers(part)


def _as_estimated(spec: StageSpec) -> StageSpec:
    """The stage on its first rows and in small steps, with answers of its own sampling instead of an engine's."""
    changes: dict[str, Any] = {}
    config: Any = spec.config
    if isinstance(data := getattr(config, "data", None), DataConfig):
        rows, times = _rows_read(spec), _times_as_many(spec) or 1.0
        paths = [path for _, path in spec.sources(data, "data")[1:]]
        mix = [fewer_of(part, path, times) for part, path in zip(data.mix, paths, strict=True)]
        changes["data"] = replace(data, limit=min(data.limit or rows, rows), mix=mix)
    if isinstance(sampling := getattr(config, "sampling", None), SamplingConfig):
        ahead: dict[str, Any] = {"max_staleness": 0} if isinstance(sampling, RolloutSamplingConfig) else {}
        changes["sampling"] = replace(sampling, engine=Engine.own, **ahead)
    if is_automatic(config):
        config = with_tokens(config, DEFAULT_TOKENS)
    if isinstance(optim := getattr(config, "optim", None), OptimConfig):
        changes["optim"] = replace(optim, batch_size=min(optim.batch_size, STEP_ROWS))
    if hasattr(config, "ppo_epochs"):
        changes["ppo_epochs"] = 1
    if hasattr(config, "drop_ties"):  # answers without numbers all score alike, so nothing would be learned
        changes["drop_ties"] = False
    return replace(spec, config=replace(config, **changes), sharding=Sharding.none, offload=Offload.none)


def _times_as_many(spec: StageSpec) -> float | None:
    """How many times as many of its own rows the whole stage reads; None if that is not known."""
    slot = next((slot for slot in kind_of(spec.config).data(spec.config) if slot.field == "data"), None)
    data = getattr(spec.config, "data", None)
    if slot is None or not isinstance(data, DataConfig):
        return 1.0
    return times_as_many(spec.data_path, data, slot.record, _rows_read(spec))


def _rows_read(spec: StageSpec) -> int:
    """Those of a whole batch at least, because a batch of fewer rows holds less."""
    return max(FEW_ROWS, getattr(spec.config, "batch_size", 0)) if spec.adapter is None else ROWS


def _run(spec: StageSpec, recorder: Recorder, function: Any, *, publishes: bool) -> None:
    context = StageContext(spec=spec, rank=0, world_size=1)
    context.content.mkdir(parents=True, exist_ok=True)
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(context.seed("worker") % 2**32)
    forget_plans()  # those of an earlier estimate would cost this one nothing
    with recorder.recording():
        result = function(spec.config, context)
        context.progress(SAVING)
    if publishes:
        publish_result(spec, context, result)
    shutil.rmtree(spec.work, ignore_errors=True)


def _scale(recorder: Recorder) -> float:
    periods = recorder.all_steps / recorder.period
    by_tokens = recorder.mean_tokens * recorder.period / recorder.tokens_of_period if recorder.tokens_of_period else 1.0
    return periods * by_tokens


def _phases(recorder: Recorder, timer: Timer, repeats: Repeats) -> dict[str, PhaseCost]:
    costs = {}
    for name, phase in recorder.phases.items():
        in_steps: Operations = Counter() if name == VALIDATING else recorder.step_operations.get(name, Counter())
        times = _times(name, recorder, repeats, processes=timer.processes) if in_steps else 1.0
        if name == VALIDATING:
            looks = math.ceil(recorder.all_steps * repeats.of_steps / recorder.look_every)
            times = looks / recorder.looks_taken * repeats.held_out
        elif not in_steps and name not in ONCE:
            times = repeats.rows
        flop, seconds = _work(recorder, timer, in_steps or phase.operations)
        outside = recorder.operations_outside_steps(name) if in_steps else Counter()
        flop_outside, seconds_outside = (work / timer.processes for work in _work(recorder, timer, outside))
        costs[name] = PhaseCost(
            peak=phase.peak,
            held=phase.peak if timer.is_gpu else phase.resident + _beside(name, phase, recorder, repeats),
            parts=phase.parts,
            flop=flop * times + flop_outside,
            seconds=(timer.startup if name == STARTING else 0.0) + seconds * times + seconds_outside,
        )
    return costs


def _beside(name: str, phase: Phase, recorder: Recorder, repeats: Repeats) -> int:
    """Bytes beside the tensors of a process on a CPU once it computes. Sampled answers have ever new lengths, so that
    there is soon code for as many shapes as oneDNN caches, if it makes any. Micro-batches have new lengths too, those
    of later steps as many as those of the last step that ran."""
    if name in BEFORE:
        return 0
    most = int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024"))  # oneDNN's own default
    of_shape = AMX_CODE_BYTES if hardware.has_amx() else CODE_BYTES
    later = max(0.0, recorder.all_steps * repeats.of_steps / recorder.period - recorder.periods_run)
    shapes = min(phase.compiled + recorder.compiled_in_period * later, most)
    if phase.compiled and ({SAMPLING, ANSWERING} & recorder.phases.keys()):
        shapes = most
    return int(RUNTIME_BYTES + of_shape * shapes + _holes(recorder))


def _holes(recorder: Recorder) -> float:
    if SAMPLING not in recorder.phases or not recorder.all_steps:
        return 0.0
    changing = (sum(phase.parts.get(part, 0) for part in CHANGING) for phase in recorder.phases.values())
    return HOLES * max(changing)


def _times(name: str, recorder: Recorder, repeats: Repeats, *, processes: int) -> float:
    """How often the whole stage does what it did in the last period. An optimiser's step takes the same for every
    number of rows, which the processes of a launch share out."""
    periods = recorder.all_steps / recorder.period
    if name == OPTIMISING:
        return periods * repeats.of_steps
    learning = repeats.learning if name == LEARNING else 1.0
    return _scale(recorder) * repeats.steps * learning / processes


def _work(recorder: Recorder, timer: Timer, operations: Operations) -> tuple[float, float]:
    """FLOP and seconds. On a CPU only the operations that take nearly all of the time are timed, and it is assumed that
    the others take as long for what they do."""
    flop = moved = 0.0
    runs: Counter[Any] = Counter()
    expected: defaultdict[Hashable, float] = defaultdict(float)
    forms = {key: alike(recorder.examples[key]) for key in operations}
    for key, count in operations.items():
        example = recorder.examples[key]
        of_bytes, of_flop = count * bytes_of(example), count * flop_of(example)
        moved += of_bytes
        flop += of_flop
        runs[example.func] += count
        expected[forms[key]] += of_flop / EXPECTED_FLOPS + of_bytes / EXPECTED_BANDWIDTH + count * BETWEEN_SECONDS
    timed = set(expected) if timer.is_gpu else _largest(expected, TIMED_SHARE)
    examples = {key: recorder.examples[key] for key in operations if forms[key] in timed}
    each = timer.seconds({key: (example, moved / runs[example.func]) for key, example in examples.items()})
    seconds = math.fsum(operations[key] * (of_one + timer.between) for key, of_one in each.items())
    covered = math.fsum(expected[form] for form in timed)
    return flop, seconds * math.fsum(expected.values()) / covered if covered else 0.0


def _largest(sizes: Mapping[Hashable, float], share: float) -> set[Hashable]:
    largest: set[Hashable] = set()
    left = share * math.fsum(sizes.values())
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        if left <= 0:
            break
        largest.add(key)
        left -= sizes[key]
    return largest


if __name__ == "__main__":
    end_process(main())
