"""One stage on one process: ``python -m alignment.worker STAGE.YAML``, under a launcher, once on every rank.

Reads what the driver froze, runs the stage, and on the main process publishes the artifact. How it ended stands in
``status.json``, because launchers do not hand on exit codes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # what follows takes seconds to import, and a signal must not kill the process meanwhile
    from alignment.core.stop_requests import stop_while_importing
    from alignment.records.worker import write_stopped_before_it_began

    stop_while_importing(lambda: write_stopped_before_it_began(Path(sys.argv[1])))

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
from alignment.core import stop_requests
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import PREEMPTED as PREEMPTED_CODE
from alignment.core.errors import AlignmentError, DataError, StageError
from alignment.core.files import disk_error, path_error
from alignment.core.fingerprint import digest
from alignment.core.locks import held
from alignment.core.streams import make_unfailing
from alignment.core.versions import versions
from alignment.data.chat_template import template_text
from alignment.data.hub_rows import content_of
from alignment.job import StageSpec
from alignment.records.worker import DONE, FAILED, PREEMPTED, STATUS, Status
from alignment.stages.base import StageKind
from alignment.stages.registry import kind_of
from alignment.stages.shared.result import StageResult
from alignment.stages.stage_file import read_spec
from alignment.training import checkpoints
from alignment.training.context import StageContext
from alignment.training.session import Preempted, usage
from alignment.training.sharding import begin

RESERVE = "reserve"
"""A file that is given up where the disk is full, so that there is room to say so."""
_RESERVED = 1 << 16


def main(path: Path) -> int:
    """Runs the stage; returns the exit code (alignment/core/errors.py)."""
    spec = read_spec(path)
    context = StageContext(
        spec=spec, rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1"))
    )
    _quiet()
    context.heartbeat.start(spec.work, context.rank)
    try:
        for number in stop_requests.SIGNALS:
            signal.signal(number, _stop_now)
        with _alone(context):
            _run(spec, context)
        stop_requests.ignore()
    except Preempted as stop:
        stop_requests.ignore()
        if stop.saved:
            _leave_together()
        _finish(context, PREEMPTED, PREEMPTED_CODE, f"stopped on request; {_what_is_saved(stop)}")
        return PREEMPTED_CODE
    except AlignmentError as error:
        stop_requests.ignore()
        _finish(context, FAILED, error.exit_code, str(error))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - the last line of defence: the driver must hear of it
        stop_requests.ignore()
        traceback.print_exc()
        if (failure := _of_file_system(error, context)) is not None:
            _finish(context, FAILED, failure.exit_code, str(failure))
            return failure.exit_code
        if _is_out_of_memory(error):
            _finish(context, FAILED, StageError.exit_code, str(_too_large(error, context)))
            return StageError.exit_code
        _finish(context, FAILED, 1, f"{type(error).__name__}: {error}")
        return 1
    _finish(context, DONE, 0, "")
    return 0


def _what_is_saved(stop: Preempted) -> str:
    return "a checkpoint was written" if stop.saved else "it was not training, and goes on from what was there"


def _of_file_system(error: BaseException, context: StageContext) -> AlignmentError | None:
    """A disk that takes no more, or a path that cannot be used; what only holds space is removed first."""
    if (full := disk_error(error, folder=context.spec.work)) is not None:
        if context.is_main:
            checkpoints.discard_unfinished(context.checkpoints)
            (context.spec.work / RESERVE).unlink(missing_ok=True)
        return full
    return path_error(error) if isinstance(error, OSError) else None


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA says so by a type, the CPU's allocator in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _too_large(error: BaseException, context: StageContext) -> StageError:
    return StageError(
        f"out of memory while {context.heartbeat.phase}: {str(error).splitlines()[0]}",
        remedy="lower optim.micro_batch_tokens, set optim.activation_checkpointing=true, or train an adapter",
    )


def _alone(context: StageContext) -> AbstractContextManager[object]:
    """A lock of the worker's own: its launcher may be killed while it works on."""
    return held(context.spec.work / "worker.lock", wait=False) if context.is_main else nullcontext()


def _run(spec: StageSpec, context: StageContext) -> None:
    _refuse_changed_data(spec)
    context.content.mkdir(parents=True, exist_ok=True)
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    if context.is_main:
        (spec.work / RESERVE).write_bytes(b"\xff" * _RESERVED)
    seed = context.seed("worker") % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    begin(context)
    with _tracked(context):
        result = function_of(kind_of(spec.config))(spec.config, context)
        if context.is_main:
            context.trackers.result(_publish(spec, context, result), spec.artifact)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def function_of(kind: StageKind) -> Callable[[StageConfig, StageContext], StageResult]:
    """The kind's own function, imported here and not before: it brings the training libraries."""
    module, _, name = kind.run.partition(":")
    function: Callable[[StageConfig, StageContext], StageResult] = getattr(importlib.import_module(module), name)
    return function


@contextmanager
def _tracked(context: StageContext) -> Iterator[None]:
    """Trackers follow the stage from here to its end, whatever that is."""
    if context.is_main:
        context.trackers.start(context.spec)
    done = False
    try:
        yield
        done = True
    finally:
        context.trackers.close(done=done)


def _refuse_changed_data(spec: StageSpec) -> None:
    """The fingerprint was taken when the run was planned, which may be hours ago."""
    planned_data = [(spec.data_path, spec.identity.get("data"))]
    planned_data += [
        (spec.extra_data[field], planned) for field, planned in spec.identity.get("extra_data", {}).items()
    ]
    for path, planned in planned_data:
        if planned is not None and content_of(path) != planned:
            raise DataError(
                "changed since the run was planned", where=str(path), remedy="start the run again to plan anew"
            )
    template, planned = spec.model.chat_template, spec.identity.get("base", {}).get("chat_template")
    if template is not None and planned is not None and digest(template_text(template)) != planned:
        raise DataError(
            "changed since the run was planned", where="model.chat_template", remedy="start the run again to plan anew"
        )


def _stop_now(_: int, __: FrameType | None) -> None:
    """Outside a training there is nothing to save; a trainer puts a handler of its own in place of this one."""
    raise Preempted(saved=False)


def _publish(spec: StageSpec, context: StageContext, result: StageResult) -> Manifest:
    context.progress("saving")
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


def _finish(context: StageContext, state: str, exit_code: int, error: str) -> None:
    """The first process that fails says so; a success is the main process's to say."""
    folder = context.spec.run_folder
    if (folder / STATUS).exists() or (state == DONE and not context.is_main):
        return
    several = f", process {context.rank} of {context.world_size}" if context.world_size > 1 else ""
    status = Status(
        state=state,
        exit_code=exit_code,
        error=error,
        where=f"stage {context.spec.stage}" + several,
        time=time.time(),
        notes=context.trackers.faults,
    )
    try:
        status.write(folder)
    except OSError:  # the driver sees how the process ended, and that the disk is full
        traceback.print_exc()


def _leave_together() -> None:
    """No process goes before all have saved: the first to end would have the launcher end the others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _quiet() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\b.*")


if __name__ == "__main__":
    make_unfailing()
    sys.exit(main(Path(sys.argv[1])))
