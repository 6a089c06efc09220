"""Faults of what surrounds a run: a store that is away, a full disk, a killed process, what a process is told."""

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
            "(Busy, StoreError, DiskError)",
            "(Busy, DiskError)",
            "test_what_hinders_every_trial_fails_none_and_ends_the_sweep",
        ),
        (
            "a trial that does not meet a gate has failed",
            "if outcome.is_done else outcome.error",
            "if not outcome.code else outcome.error",
            "test_a_trial_that_misses_a_gate_counts_and_the_gate_is_named",
        ),
    ),
    *in_file(
        "commands/shared/worker_process.py",
        "unit/commands/shared/test_worker_process.py",
        (
            "an export that is killed leaves a hidden folder",
            "shutil.rmtree(partial_folder(target), ignore_errors=True)",
            "pass",
            "test_a_command_whose_process_is_killed_says_so",
        ),
    ),
    *in_file(
        "pipeline/sweeps/run.py",
        f"{PIPELINE}/sweeps/test_sweep_sources.py",
        (
            "the first download begins another study",
            "return read_sweep(wanted.recipe, str(wanted.file), wanted.overrides)",
            "return wanted",
            "test_the_first_download_begins_no_second_study",
        ),
    ),
    *in_file(
        "pipeline/sweeps/study.py",
        f"{PIPELINE}/sweeps/test_sweep.py",
        (
            "a trial is recorded behind half a line",
            "cut_unfinished_line(self._journal)  # optuna",
            "pass  # optuna",
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
        (
            "machines give up on one that works",
            "        stack.enter_context(machines.showing_life(plan.run_folder, plan.config.launch))\n",
            "",
            "test_other_machines_see_that_the_first_one_lives",
        ),
    ),
    *in_file(
        "pipeline/backends/machines.py",
        f"{PIPELINE}/test_machines.py",
        (
            "another machine answers before the first one lives",
            'attempt["attempt"] != earlier or self._signs.have_changed',
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
        "engines/keeper_process.py",
        "unit/engines/test_server_process.py",
        (
            "the child of a server that was killed stays",
            "_prctl(_PR_SET_CHILD_SUBREAPER, 1)",
            "pass",
            "test_the_end_of_a_server_is_noticed_later_too_and_its_child_ends_with_the_keeper",
        ),
        (
            "a server that ignores a request to end stays",
            "    kill_all(_living)\n",
            "",
            "test_a_server_that_does_not_end_when_it_is_asked_to_is_killed",
        ),
    ),
    *in_file(
        "core/child_processes.py",
        "unit/core/test_child_processes.py",
        (
            "a resource tracker is killed with the processes that it watches",
            "if not (spares_trackers and _is_resource_tracker(process)):",
            "if True:",
            "test_killed_processes_leave_no_shared_memory",
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
    *in_file(
        "pipeline/backends/slurm.py",
        f"{PIPELINE}/test_jobs.py",
        (
            "a job that ran out of memory is waited for for ever",
            '"NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", ',
            "",
            "test_states_of_a_job_mean_what_slurm_documents",
        ),
    ),
    *in_file(
        "pipeline/execute/rehearsed.py",
        f"{PIPELINE}/test_rehearsal.py",
        (
            "an edited scorer counts as tried",
            'SCORERS: ("data", "code"),',
            'SCORERS: ("data",),  # which is all',
            "test_an_edited_function_is_tried_again",
        ),
        (
            "another limit counts as tried",
            '        "max_prompt_length",\n',
            "",
            "test_a_setting_that_decides_which_rows_fit_is_tried_again",
        ),
    ),
    *in_file(
        "pipeline/execute/exchange.py",
        f"{PIPELINE}/remote/test_exchange.py",
        (
            "checkpoints of the machine that took over are removed",
            "if not lease.lost.is_set():",
            "if True:",
            "test_a_machine_that_has_lost_its_lease_leaves_what_the_other_machine_has",
        ),
    ),
    *in_file(
        "pipeline/remote/checkpoint_uploads.py",
        f"{PIPELINE}/remote/test_remote_checkpoints.py",
        (
            "without its lease a machine uploads at its end",
            " and not self._lease.lost.is_set()",
            "",
            "test_a_machine_that_has_lost_its_lease_uploads_nothing",
        ),
        (
            "without its lease a machine goes on uploading",
            "            if self._lease.lost.is_set():",
            "            if False:",
            "test_a_machine_that_has_lost_its_lease_uploads_nothing",
        ),
    ),
    *in_file(
        "pipeline/sweeps/trials.py",
        f"{PIPELINE}/sweeps/test_trials.py",
        (
            "a trial has all cores",
            "os.sched_setaffinity(self._process.pid, share.cores)",
            "pass",
            "test_it_gets_its_share_of_the_machine",
        ),
        (
            "a trial has all devices",
            "{} if share.devices is None else",
            "{} if True else",
            "test_it_gets_its_share_of_the_machine",
        ),
    ),
    *in_file(
        "pipeline/backends/environment.py",
        f"{PIPELINE}/backends/test_environment.py",
        (
            "a file of the user's hides our package",
            '"PYTHONSAFEPATH": "1", ',
            "",
            "test_files_in_the_working_folder_hide_no_module_of_ours",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        f"{PIPELINE}/test_run.py",
        (
            "a stage has two minutes to save, whatever is set",
            "grace_seconds=launch.grace_seconds,",
            "grace_seconds=120,",
            "test_a_stage_holds_its_lock_itself",
        ),
    ),
    *in_file(
        "pipeline/sources/model_sources.py",
        f"{PIPELINE}/test_plan.py",
        (
            "another chat template reuses results",
            '".json", ".safetensors", ".jinja", ',
            '".json", ".safetensors", ',
            "test_every_file_that_a_model_is_read_from_counts",
        ),
    ),
    *in_file(
        "commands/judge/driver.py",
        "unit/commands/judge/test_driver.py",
        (
            "two arms have to be named",
            "if not arms and len(labels) == 2:",
            "if False:",
            "test_arms_are_named_by_label_or_in_full_and_need_no_naming_where_there_are_two",
        ),
    ),
    *in_file(
        "pipeline/plan/gate_checks.py",
        f"{PIPELINE}/test_evaluation_gates.py",
        (
            "copies of a prompt count for a gate",
            "min(rows, seen.prompts)",
            "rows",
            "test_prompts_of_a_gate_are_different_and_are_used",
        ),
        (
            "prompts that are not drawn count for a gate",
            "min(rows, seen.prompts)",
            "seen.prompts",
            "test_prompts_of_a_gate_are_different_and_are_used",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        f"{PIPELINE}/test_jobs.py",
        (
            "a stage is started here while its job waits",
            "if only is None or HERE not in plan.overrides:",
            "if only is None:",
            "test_a_stage_whose_job_waits_is_started_by_that_job_alone",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        f"{PIPELINE}/test_evaluation_gates.py",
        (
            "a run on Slurm that does not meet a gate is recorded as done",
            "_end(plan, RunRecorder(plan, only=only))",
            "RunRecorder(plan, only=only).end()",
            "test_a_run_of_reused_results_is_recorded_with_the_gate_that_it_misses",
        ),
    ),
    *in_file(
        "commands/chat/driver.py",
        "unit/commands/chat/test_driver.py",
        (
            "options of a chat are dropped",
            '"options": dict(options)',
            '"options": {**options, "system": "", "seed": 0}',
            "test_options_and_the_engine_arrive_at_the_worker",
        ),
        (
            "the engine of a chat is dropped",
            '"engine": engine}',
            '"engine": None}',
            "test_options_and_the_engine_arrive_at_the_worker",
        ),
    ),
    *in_file(
        "pipeline/backends/machines.py",
        "unit/pipeline/test_machines.py",
        (
            "a result that is shown late is another one",
            "not late_results.is_shown(self._stage.artifact)",
            "read_manifest(self._stage.artifact) is None",
            "test_a_result_that_the_file_system_shows_late_is_waited_for",
        ),
    ),
    *in_file(
        "commands/track/worker.py",
        "unit/commands/track/test_track.py",
        (
            "another run's result is tracked as this run's",
            " and spec.artifact.name == artifact.name",
            "",
            "test_a_result_of_another_run_is_not_sent_as_this_run_s",
        ),
    ),
    *in_file(
        "commands/push/driver.py",
        "unit/commands/push/test_push.py",
        (
            "a private repository stays private without a word",
            "if info.private and public:",
            "if False:",
            "test_it_is_public_only_on_request",
        ),
    ),
    *in_file(
        "worker.py",
        "unit/test_worker.py",
        (
            "a model may change during a run",
            "and identity_of_folder(folder) != planned:",
            "and not planned:",
            "test_a_model_folder_that_changed_since_the_plan_is_refused",
        ),
        (
            "sampling is said to need smaller micro-batches",
            'if phase != "sampling":',
            'if phase != "rollouts":',
            "test_advice_on_memory_is_about_the_phase_that_ran_out_of_it",
        ),
    ),
]
