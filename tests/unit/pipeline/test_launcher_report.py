"""Which process failed first, out of reports that torchrun itself wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure as TorchFailure

from alignment.core import logs
from alignment.core.errors import AlignmentError, StageError
from alignment.core.logs import begin_attempt
from alignment.pipeline.execute.worker_protocol import ProcessFailure, first_failure, raise_for_status
from alignment.records.worker import FAILED, Status


def _report(*failures: tuple[int, int, int]) -> str:
    """What torchrun prints of processes given as (rank, exit code, second), in the order in which it saw them."""
    torchs = {}
    for rank, code, second in failures:
        torchs[rank] = TorchFailure(local_rank=rank, pid=4000 + rank, exitcode=code, error_file="<N/A>")
        torchs[rank].timestamp = 1_790_000_000 + second
    return f"step 3\n{ChildFailedError('alignment.worker', torchs)}\n"


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([(1, -9, 0)], (1, -9)),
        ([(0, 1, 0)], (0, 1)),
        # The other process lost its connection, and torchrun saw both at once.
        ([(0, 1, 0), (1, -9, 0)], (1, -9)),
        ([(1, -9, 0), (0, 1, 0)], (1, -9)),
        # The second in which both ended turned between two looks.
        ([(0, 1, 0), (1, -9, 1)], (1, -9)),
        ([(0, 1, 0), (1, -11, 0)], (1, -11)),
        ([(0, 1, 0), (1, -7, 0)], (1, -7)),
        ([(0, 1, 0), (1, -26, 0)], (1, -26)),
        # torchrun itself ends those that remain, and kills what does not end in half a minute.
        ([(0, 1, 0), (1, -15, 0)], (0, 1)),
        ([(0, 1, 0), (1, -9, 30)], (0, 1)),
        # NCCL aborts a process that lost its connection.
        ([(0, -6, 1), (1, 1, 0)], (1, 1)),
        ([(rank, 1, 0) for rank in range(7)] + [(7, -9, 0)], (7, -9)),
    ],
)
def test_the_process_that_brought_down_the_others(
    failures: list[tuple[int, int, int]], expected: tuple[int, int]
) -> None:
    assert first_failure(_report(*failures)) == ProcessFailure(*expected)


@pytest.mark.parametrize("printed", ["", "step 3\nKeyError: 'rank'\n", "  rank      : 1\n  exitcode  : -9\n"])
def test_a_log_without_a_report_names_nobody(printed: str) -> None:
    assert first_failure(printed) is None


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((1, -9, 0), "process 1 ended by signal 9 (often because the machine ran out of memory"),
        ((1, -11, 0), "process 1 ended by signal 11 without reporting an error"),
        ((1, -26, 0), "process 1 ended by SIGVTALRM (a chat template did not finish"),
    ],
)
def test_a_killed_process_is_named_and_not_the_connection_that_the_first_one_lost(
    tmp_path: Path, failure: tuple[int, int, int], expected: str
) -> None:
    Status(state=FAILED, exit_code=1, error="RuntimeError: Connection reset by peer").write(tmp_path)
    torchruns_own = (2, -9, 31)
    (tmp_path / "log.txt").write_text(_report((0, 1, 0), failure, torchruns_own))
    with pytest.raises(StageError) as caught:
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])
    assert expected in str(caught.value)


def test_a_report_of_an_earlier_attempt_says_nothing_about_this_one(tmp_path: Path) -> None:
    Status(state=FAILED, exit_code=1, error="KeyError: 'x'").write(tmp_path)
    log = tmp_path / "log.txt"
    begin_attempt(log, "attempt 1 at sft-1")
    _append(log, _report((0, 1, 0), (1, -9, 0)))
    begin_attempt(log, "attempt 2 at sft-1")
    _append(log, _report((0, 1, 900), (1, -15, 900)))
    with pytest.raises(AlignmentError, match="KeyError: 'x'"):
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])


def test_a_killed_process_is_named_out_of_a_log_that_was_shortened(tmp_path: Path) -> None:
    Status(state=FAILED, exit_code=1, error="RuntimeError: Connection reset by peer").write(tmp_path)
    log = tmp_path / "log.txt"
    _append(log, "step\n" * (logs.LIMIT // 10))
    begin_attempt(log, "attempt 2 at sft-1")
    _append(log, "step\n" * (logs.LIMIT // 5) + _report((0, 1, 0), (1, -9, 0)))
    logs.shorten(log)
    with pytest.raises(StageError, match="process 1 ended by signal 9"):
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])


def _append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def test_a_process_that_torchrun_killed_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(_report((0, -6, 0), (1, -9, 31)))
    with pytest.raises(StageError, match="process 0 ended by signal 6 without reporting an error"):
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])


def test_a_bug_of_the_first_process_stays_one_when_torchrun_ends_the_others(tmp_path: Path) -> None:
    Status(state=FAILED, exit_code=1, error="KeyError: 'x'").write(tmp_path)
    (tmp_path / "log.txt").write_text(_report((0, 1, 0), (1, -15, 0), (2, -9, 31)))
    with pytest.raises(AlignmentError, match="KeyError: 'x'") as caught:
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])
    assert caught.value.exit_code == 1
