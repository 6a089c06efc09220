"""Runs one stage on one process: ``python -m alignment.worker STAGE.YAML``, started by a launcher on every rank. It
reads the stage file that the driver wrote and runs the stage; the main process publishes the artifact. The outcome is
written to ``status.json``, because launchers do not pass on exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds, and a signal must not kill the process meanwhile
    from alignment.core import child_processes
    from alignment.core.child_processes import stop_while_importing
    from alignment.records.worker import write_stopped_before_it_began

    child_processes.hide()
    stop_while_importing(lambda: write_stopped_before_it_began(Path(sys.argv[1])))

import gc
import importlib
import logging
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from types import FrameType

import numpy as np
import torch
import transformers

from alignment.config.stage import StageConfig
from alignment.core import child_processes
from alignment.core.artifacts import Manifest, publish, verify
from alignment.core.child_processes import end_process
from alignment.core.errors import PREEMPTED as PREEMPTED_CODE
from alignment.core.errors import AlignmentError, DataError, ModelError, StageError
from alignment.core.files import disk_error, path_error
from alignment.core.fingerprint import digest
from alignment.core.hardware import versions
from alignment.core.locks import held
from alignment.core.terminal import make_unfailing
from alignment.data.chat_template import template_text
from alignment.data.source_files import content_of
from alignment.job import StageSpec
from alignment.models.kernels.row_attention import without_cudnn
from alignment.pipeline.sources.model_sources import OF_FOLDER, identity_of_folder
from alignment.records import training
from alignment.records.run import Attempts
from alignment.records.worker import DONE, FAILED, PREEMPTED, STATUS, Status
from alignment.stages.base import StageKind
from alignment.stages.registry import OURS, kind_of, origin_of, read_spec
from alignment.stages.shared.automatic_size import with_chosen_size
from alignment.stages.shared.result import StageResult
from alignment.training import checkpoints
from alignment.training.context import StageContext
from alignment.training.longest_batch import is_out_of_memory
from alignment.training.session import Preempted, usage
from alignment.training.sharding import begin

RESERVE = "reserve"
"""A file that is deleted when the disk is full, to make room for ``status.json``."""
_RESERVED = 1 << 16


def main(path: Path) -> int:
    """Runs the stage; returns the exit code (alignment/core/errors.py)."""
    spec = read_spec(path)
    context = StageContext(
        spec=spec, rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1"))
    )
    _silence_libraries()
    gc.freeze()  # every trainer collects garbage first, which takes half a second among the libraries' objects
    context.heartbeat.start(spec.work, context.rank)
    try:
        for number in child_processes.SIGNALS:
            signal.signal(number, _stop_now)
        with _worker_lock(context):
            _run(spec, context)
        child_processes.ignore()
    except Preempted as stop:
        child_processes.ignore()
        if stop.saved and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the launcher ends the others when the first process exits
        _finish(context, PREEMPTED, PREEMPTED_CODE, f"stopped on request; {_save_state(stop)}")
        return PREEMPTED_CODE
    except AlignmentError as error:
        child_processes.ignore()
        _finish(context, FAILED, error.exit_code, str(error), rank=error.rank)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - last resort: the driver must learn of every failure
        child_processes.ignore()
        traceback.print_exc()
        if (failure := _file_system_error(error, context)) is not None:
            _finish(context, FAILED, failure.exit_code, str(failure))
            return failure.exit_code
        if is_out_of_memory(error):
            _finish(context, FAILED, StageError.exit_code, str(_out_of_memory(error, context)))
            return StageError.exit_code
        _finish(context, FAILED, 1, f"{type(error).__name__}: {error}")
        return 1
    _finish(context, DONE, 0, "")
    return 0


def _save_state(stop: Preempted) -> str:
    if stop.saved:
        return "a checkpoint was written"
    if stop.trained:
        return "its training had ended, and the next attempt continues from the last checkpoint"
    return "it was not training, so no checkpoint was written"


def _file_system_error(error: BaseException, context: StageContext) -> AlignmentError | None:
    if (full := disk_error(error, folder=context.spec.work)) is not None:
        if context.is_main:
            checkpoints.discard_unfinished(context.checkpoints)
            (context.spec.work / RESERVE).unlink(missing_ok=True)
        return full
    return path_error(error) if isinstance(error, OSError) else None


def _out_of_memory(error: BaseException, context: StageContext) -> StageError:
    return StageError(
        f"out of memory while {context.heartbeat.phase}: {next(iter(str(error).splitlines()), type(error).__name__)}",
        remedy=_memory_remedy(context),
    )


def _memory_remedy(context: StageContext) -> str:
    config = context.spec.config
    optim = getattr(config, "optim", None)
    if limits := _limits_of_sampling(config, context.peaks.name):
        return f"lower {', '.join(limits)} or max_new_tokens, or use a machine with more memory"
    if (own := context.spec.work / training.OWN_FILE).exists():
        return (
            f"less memory is free now than when the size of micro-batches was chosen; delete {own} and "
            f"{training.cache_files(context.spec.artifact.parent)} to choose it again, or set a number"
        )
    if hasattr(optim, "micro_batch_tokens"):
        checkpointing = hasattr(optim, "activation_checkpointing")
        more = ", set optim.activation_checkpointing=true" if checkpointing else ""
        return f"lower optim.micro_batch_tokens{more}, or train an adapter"
    limits = [name for name in ("micro_batch_tokens", "batch_size") if hasattr(config, name)]
    lower = f"lower {' or '.join(limits)}, or " if limits else ""
    return f"{lower}use a machine with more memory"


def _limits_of_sampling(config: StageConfig, phase: str) -> list[str]:
    """The settings that say how many answers are sampled at once, if the phase samples; micro-batches do not."""
    if phase == "answering":
        return ["batch_size"]
    if phase != "sampling":
        return []
    guard = getattr(config, "guard", None)
    return ["optim.batch_size", *(["guard.prompts"] if guard is not None and guard.every else [])]


def _worker_lock(context: StageContext) -> AbstractContextManager[object]:
    """The worker holds a lock itself, because it may keep running after its launcher is killed."""
    return held(context.spec.work / "worker.lock", wait=False) if context.is_main else nullcontext()


def _run(spec: StageSpec, context: StageContext) -> None:
    _refuse_changed_data(spec)
    if context.is_main:  # one process is enough: where hashes are not remembered, all weights are read
        _refuse_changed_models(spec)
    context.content.mkdir(parents=True, exist_ok=True)
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    if context.is_main:
        (spec.work / RESERVE).write_bytes(b"\xff" * _RESERVED)
    seed = context.seed("worker") % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    begin(context)
    with _tracked(context), without_cudnn():
        run = function_of(kind_of(spec.config))
        child_processes.show()
        context = with_chosen_size(context, run)
        result = run(context.spec.config, context)
        _refuse_other_results(result, function=kind_of(spec.config).run)
        if context.is_main:
            context.trackers.result(publish_result(spec, context, result), spec.artifact)
            context.notes.extend(_unreported(spec.config, result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def function_of(kind: StageKind) -> Callable[[StageConfig, StageContext], StageResult]:
    """The kind's ``run`` function, imported only here because it imports the training libraries."""
    module, _, name = kind.run.partition(":")
    function: Callable[[StageConfig, StageContext], StageResult] = getattr(importlib.import_module(module), name)
    return function


def _refuse_other_results(result: object, *, function: str) -> None:
    """Type checkers see the functions of the built-in kinds, but not those of other packages. Raises StageError: what
    the stage's function returned does not fit the manifest."""
    if not isinstance(result, StageResult):
        raise StageError(
            f"the function {function} returned {result!r:.60}, not a StageResult",
            remedy="return StageResult(metrics={…}), from alignment.stages.shared.result",
        )
    for name, value in result.metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise StageError(
                f"the metric {name!r} is {value!r:.60}, not a Python number",
                remedy=f"let {function} return numbers, such as float(value)",
            )


def _unreported(config: StageConfig, result: StageResult) -> Iterator[str]:
    """A note on metrics that a kind from another package declares and did not report; the built-in kinds have tests. It
    is no error, because the result is complete, and may have taken hours."""
    if origin_of(config.kind) == OURS:
        return
    missing = [name for name in kind_of(config).outcome.metrics(config).names if name not in result.metrics]
    if missing:
        yield (
            f"it did not report {', '.join(missing)}, which Outcome.metrics of its kind declares, "
            "so a sweep cannot use them"
        )


@contextmanager
def _tracked(context: StageContext) -> Iterator[None]:
    if context.is_main:
        context.trackers.start(context.spec)
    done = False
    try:
        yield
        done = True
    except BaseException:
        child_processes.ignore()  # closing may take a minute, and a request to stop would take the place of this error
        raise
    finally:
        context.trackers.close(done=done)


def _refuse_changed_data(spec: StageSpec) -> None:
    """Compares data and chat template with their fingerprints from the plan, which may be hours old. Raises DataError:
    one of them has changed since; ArtifactError: rows that another stage made are missing or damaged."""
    for made_by in spec.made_rows.values():
        assert made_by.path is not None, "the plan resolves it to the stage's result"
        verify(made_by.path, content=True)
    planned_data = [(spec.data_path, spec.identity.get("data"))]
    planned_data += [
        (spec.extra_data[field], planned) for field, planned in spec.identity.get("extra_data", {}).items()
    ]
    changed = [str(path) for path, planned in planned_data if planned is not None and content_of(path) != planned]
    template, planned = spec.model.chat_template, spec.identity.get("base", {}).get("chat_template")
    if template is not None and planned is not None and digest(template_text(template)) != planned:
        changed.append("model.chat_template")
    if changed:
        raise DataError(
            "changed since the run was planned", where=changed[0], remedy="start the run again to plan it again"
        )


def _refuse_changed_models(spec: StageSpec) -> None:
    models = [(spec.base_path, spec.identity.get("base", {}).get("content"))]
    models += [
        (used.path, spec.input_fingerprints.get(slot))
        for slot, used in {**spec.inputs, **spec.arms}.items()
        if used.path is not None
    ]
    for folder, planned in models:
        if planned is not None and planned.startswith(OF_FOLDER) and identity_of_folder(folder) != planned:
            raise ModelError(
                "changed since the run was planned",
                where=str(folder),
                remedy="start the run again to plan it again; do not write to the folder of a model that a run uses",
            )


def _stop_now(_: int, __: FrameType | None) -> None:
    """Outside of training there is nothing to save; a trainer replaces this handler with its own."""
    raise Preempted(saved=False)


def publish_result(spec: StageSpec, context: StageContext, result: StageResult) -> Manifest:
    context.progress("saving")
    context.clock.earlier = max(context.clock.earlier, Attempts.read(spec.work).earlier_seconds)
    manifest = Manifest(
        stage=spec.stage,
        kind=kind_of(spec.config).produces,
        fingerprint=spec.fingerprint,
        identity=spec.identity,
        inputs=spec.input_fingerprints,
        base=result.base,
        adapters=result.adapters,
        adapters_stood=result.adapters_stood,
        metrics=result.metrics,
        usage=usage(context),
        versions=versions(),
        git_commit=spec.git_commit,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tokenizer_sha256=result.hashes.get("tokenizer_sha256", ""),
        chat_template_sha256=result.hashes.get("chat_template_sha256", ""),
    )
    complete = publish(context.content, spec.artifact, manifest)
    shutil.rmtree(spec.work, ignore_errors=True)
    return complete


def _finish(context: StageContext, state: str, exit_code: int, error: str, *, rank: int | None = None) -> None:
    """Writes ``status.json``: the first process that fails reports the failure, the main process reports success.
    ``rank`` is that of the process that met the error, if it was another one."""
    folder = context.spec.run_folder
    if (folder / STATUS).exists() or (state == DONE and not context.is_main):
        return
    rank = context.rank if rank is None else rank
    several = f", process {rank} of {context.world_size}" if context.world_size > 1 else ""
    status = Status(
        state=state,
        exit_code=exit_code,
        error=error,
        where=f"stage {context.spec.stage}" + several,
        time=time.time(),
        notes=[*context.trackers.faults, *context.notes],
    )
    try:
        status.write(folder)
    except OSError:  # the driver still sees the exit code and the full disk
        traceback.print_exc()


def _silence_libraries() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\b.*")


if __name__ == "__main__":
    make_unfailing()
    end_process(main(Path(sys.argv[1])))
