"""Faults of what surrounds a run: a store that is away, a full disk, a killed process, a machine without git."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PIPELINE = "unit/pipeline"

MUTATIONS = [
    *in_file(
        "core/files.py",
        "unit/records/test_votes.py",
        (
            "half a line stays in front of the next vote",
            "os.truncate(path, len(whole))",
            "pass",
            "test_half_a_line_does_not_count_and_is_cut_before_the_next_vote",
        ),
    ),
    *in_file(
        "core/child_processes.py",
        "unit/core/test_child_processes.py",
        (
            "where others are hidden, nobody has children",
            "return _visible_children(process, recursive=recursive)",
            "return []",
            "test_children_are_found_where_others_are_hidden",
        ),
        (
            "where others are hidden, nobody has grandchildren",
            "result += children.get(child.pid, [])",
            "pass",
            "test_children_are_found_where_others_are_hidden",
        ),
    ),
    *in_file(
        "pipeline/sweeps/run.py",
        f"{PIPELINE}/sweeps/test_sweep.py",
        (
            "each trial fails for good while a store is away",
            "(Busy, StoreError)",
            "(Busy,)",
            "test_a_store_that_cannot_be_reached_fails_no_trial_and_ends_the_sweep",
        ),
    ),
    *in_file(
        "pipeline/sweeps/study.py",
        f"{PIPELINE}/sweeps/test_sweep.py",
        (
            "a trial is recorded behind half a line",
            "cut_unfinished_line(wanted.folder / JOURNAL)",
            "pass",
            "test_a_journal_that_ends_in_half_a_line_goes_on",
        ),
    ),
    *in_file(
        "pipeline/execute/worker_protocol.py",
        f"{PIPELINE}/test_run.py",
        (
            "a machine without git runs no stage",
            "except (OSError, subprocess.TimeoutExpired):",
            "except subprocess.TimeoutExpired:",
            "test_a_checkout_on_a_machine_without_git_has_no_commit",
        ),
    ),
    *in_file(
        "pipeline/sources/model_sources.py",
        f"{PIPELINE}/test_remembered.py",
        (
            "a cache that cannot be written fails a plan",
            "with suppress(OSError):",
            "if True:",
            "test_where_the_cache_cannot_be_written_a_file_is_read_every_time",
        ),
    ),
    *in_file(
        "pipeline/execute/estimates.py",
        f"{PIPELINE}/test_estimates.py",
        (
            "an estimate removes the folder of another one",
            " and not is_held(left / _LOCK)",
            "",
            "test_of_earlier_calls_only_those_that_were_killed_are_cleared",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        f"{PIPELINE}/test_run.py",
        (
            "another machine answers what a killed first machine announced",
            "        machines.forget_attempts(plan)\n",
            "",
            "test_an_attempt_that_a_killed_driver_announced_is_forgotten",
        ),
    ),
    *in_file(
        "pipeline/backends/machines.py",
        f"{PIPELINE}/test_machines.py",
        (
            "another machine answers before the first one lives",
            'attempt["attempt"] != earlier or self._lives',
            "True",
            "test_an_attempt_of_a_first_machine_that_was_killed_is_not_answered",
        ),
    ),
    *in_file(
        "pipeline/remote/remote_checkpoints.py",
        f"{PIPELINE}/remote/test_remote_checkpoints.py",
        (
            "no checkpoint is uploaded without hard links",
            "_link(work / name, target)  # a sealed file",
            "os.link(work / name, target)  # a sealed file",
            "test_a_file_system_without_hard_links_is_no_obstacle",
        ),
    ),
    *in_file(
        "pipeline/remote/checkpoint_uploads.py",
        f"{PIPELINE}/remote/test_remote_checkpoints.py",
        (
            "a full disk hides a stop",
            "except (StoreError, OSError) as fault",
            "except StoreError as fault",
            "test_a_fault_of_the_disk_is_said_once_and_neither_ends_the_uploads_nor_hides_a_stop",
        ),
    ),
    *in_file(
        "training/checkpoints.py",
        "unit/training/test_checkpoints.py",
        (
            "a checkpoint that cannot be read now is damaged",
            "except (FileNotFoundError, ValueError,",
            "except (OSError, ValueError,",
            "test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged",
        ),
    ),
    *in_file(
        "engines/server_process.py",
        "unit/engines/test_server_process.py",
        (
            "a folder of a killed keeper stays for good",
            "        _remove_leftovers(Path(tempfile.gettempdir()))\n",
            "",
            "test_what_a_killed_keeper_left_is_removed_by_the_next_one",
        ),
        (
            "a folder of a living keeper is removed",
            " and not is_held(lock)",
            "",
            "test_what_a_killed_keeper_left_is_removed_by_the_next_one",
        ),
    ),
]
