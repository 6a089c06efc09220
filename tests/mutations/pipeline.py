"""The driver and the worker: plans, launches, exit codes, sweeps, and what a configuration may not do."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PLAN, RUN = "unit/pipeline/test_plan.py", "unit/pipeline/test_run.py"
SWEEP, SWEEP_AT_ONCE = "unit/pipeline/sweeps/test_sweep.py", "unit/pipeline/sweeps/test_sweep_at_once.py"

MUTATIONS = [
    *in_file(
        "evaluation/gate_outcomes.py",
        "unit/pipeline/test_evaluation_gates.py",
        (
            "a gate is met by the mean, however wide its interval",
            "self.gain.bounds[0] > self.required",
            "self.gain.mean > self.required",
            "test_the_whole_interval_has_to_lie_above_the_margin",
        ),
        (
            "more of any metric meets a gate",
            "gain = difference(arm, against) if higher_is_better else difference(against, arm)",
            "gain = difference(arm, against)",
            "test_less_of_a_metric_may_be_better",
        ),
    ),
    *in_file(
        "pipeline/plan/actions.py",
        PLAN,
        (
            "results are never reused",
            "return Action.reuse, artifact.name +",
            "return Action.run, artifact.name +",
            "test_everything_is_reused_once_it_is_made_and_the_run_s_name_is_only_the_report_s",
        ),
        (
            "a damaged result is reused",
            "if not damage:",
            "if True:",
            "test_a_damaged_result_is_made_again_and_the_plan_says_why",
        ),
        (
            "a result whose fingerprint starts the same is reused",
            "if manifest.fingerprint != fingerprint:",
            "if manifest.fingerprint == '':",
            "test_a_result_whose_fingerprint_only_begins_alike_is_not_reused",
        ),
    ),
    *in_file(
        "pipeline/remote/remote_checkpoints.py",
        PLAN,
        (
            "the oldest checkpoint is planned to go on from",
            "newest = max(sealed, key",
            "newest = min(sealed, key",
            "test_an_interrupted_stage_goes_on_from_its_last_complete_checkpoint",
        ),
    ),
    *in_file(
        "pipeline/plan/plan.py",
        PLAN,
        (
            "any artifact fits any slot",
            "if manifest.kind not in slot.takes:",
            "if not slot.takes:",
            "test_another_run_s_artifact_fits_a_slot_of_its_kind",
        ),
    ),
    *in_file(
        "pipeline/execute/change_lines.py",
        "unit/pipeline/test_change_lines.py",
        (
            "a line is printed again and again",
            "        if text not in self._printed:\n",
            "        if text:\n",
            "test_a_queue_that_changes_its_mind_is_heard_once",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        RUN,
        (
            "what another process has made meanwhile is made again",
            "            _remove_work(stage)\n            return False\n",
            "            pass\n",
            "test_one_that_waits_takes_what_the_other_run_made",
        ),
        (
            "Ctrl-C ends as SIGTERM does",
            "INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED",
            "PREEMPTED",
            "test_a_signal_to_the_driver_is_acknowledged_and_lets_the_stage_save_first",
        ),
        (
            "two runs work in one folder",
            'held(plan.run_folder / "lock", wait=wait, ',
            'held(plan.run_folder / f"lock-{time.time()}", wait=wait, ',
            "test_a_run_in_use_is_left_alone",
        ),
        (
            "a job removes what its chain is being written to",
            "remove_leftovers(plan.run_folder, shared=True)",
            "remove_leftovers(plan.run_folder)",
            "test_a_run_leaves_alone_what_is_being_written_into_its_folder",
        ),
        (
            "the word of an earlier attempt counts for this one",
            "    (folder / STATUS).unlink(missing_ok=True)\n",
            "",
            "test_a_stage_that_failed_before_is_judged_by_what_it_does_now",
        ),
        (
            "a stage that made nothing is taken for done",
            "if manifest is None or manifest.fingerprint != stage.fingerprint:",
            "if manifest is not None and manifest.fingerprint != stage.fingerprint:",
            "test_a_stage_that_says_it_is_done_and_left_nothing_is_a_fault",
        ),
        (
            "a driver's lock ends with it while its stage goes on",
            "keep_open=[lock],",
            "keep_open=[],",
            "test_a_stage_holds_its_lock_itself",
        ),
    ),
    *in_file(
        "pipeline/execute/worker_protocol.py",
        RUN,
        (
            "the kind of a worker's fault is lost",
            "kind = ERRORS.get(status.exit_code)",
            "kind = StageError",
            "test_what_a_worker_says_of_its_failure_reaches_the_user",
        ),
        (
            "a bug of another package's kind is taken for ours",
            "if origin != OURS})",
            "if origin == OURS})",
            "test_a_bug_of_a_kind_from_another_package_is_looked_for_there",
        ),
        (
            "a stage that saved is taken for failed",
            "if status.state == PREEMPTED or status.exit_code == PREEMPTED_CODE:",
            'if status.state == "stopped":',
            "test_a_stage_that_was_preempted_ends_the_run_with_75",
        ),
    ),
    *in_file(
        "pipeline/execute/record.py",
        RUN,
        (
            "a run with results of other settings is done",
            "done = not self._others and all",
            "done = all",
            "test_a_run_that_holds_results_of_other_settings_is_not_done",
        ),
        (
            "the time of a stage is that of its last attempt",
            "round(entry.earlier_seconds + seconds, 2)",
            "round(seconds, 2)",
            "test_the_time_of_a_stage_that_is_continued_is_that_of_all_attempts",
        ),
    ),
    *in_file(
        "pipeline/execute/attempt_times.py",
        "unit/pipeline/test_attempt_times.py",
        (
            "an attempt that was killed took no time",
            "max(0.0, last - attempts.started)",
            "0.0",
            "test_an_attempt_that_was_killed_counts_until_the_last_sign_of_life",
        ),
    ),
    *in_file(
        "pipeline/execute/heartbeats.py",
        "unit/pipeline/test_heartbeats.py",
        (
            "one process that stands still is enough",
            "any(state.idle < limit for state in states)",
            "all(state.idle < limit for state in states)",
            "test_while_one_is_at_work_nobody_is_stuck",
        ),
    ),
    *in_file(
        "records/worker.py",
        "unit/pipeline/test_heartbeats.py",
        (
            "a file that is stale for a moment ends the run",
            "with suppress(FileNotFoundError, ArtifactError):\n                heartbeats",
            "with suppress(FileNotFoundError):\n                heartbeats",
            "test_a_file_that_goes_while_it_is_read_is_no_fault",
        ),
    ),
    *in_file(
        "core/errors.py",
        "unit/training/test_finite.py",
        (
            "a number that is not finite has a stage's exit code",
            "    exit_code = 6\n",
            "    exit_code = 5\n",
            "test_a_gradient_that_is_not_finite_stops_before_the_step",
        ),
    ),
    *in_file(
        "core/errors.py",
        "unit/pipeline/test_scorers.py",
        (
            "a scorer's fault has a stage's exit code",
            "    exit_code = 9\n",
            "    exit_code = 5\n",
            "test_a_scorer_s_failure_reaches_the_user_with_a_code_of_its_own",
        ),
    ),
    *in_file(
        "core/logs.py",
        "unit/pipeline/test_launcher_report.py",
        (
            "a report of an earlier attempt is taken for one of this attempt",
            "return content[max((line.end() for line in _BEGIN.finditer(content)), default=0) :]",
            "return content",
            "test_a_report_of_an_earlier_attempt_says_nothing_about_this_one",
        ),
    ),
    *in_file(
        "worker.py",
        "unit/test_worker.py",
        (
            "a second signal replaces the error while trackers close",
            "        stop_requests.ignore()  # closing",
            "        pass  # closing",
            "test_a_signal_while_trackers_close_does_not_replace_the_error",
        ),
        (
            "data may change after the plan",
            "if planned is not None and content_of(path) != planned:",
            "if planned is None and content_of(path) != planned:",
            "test_data_that_changed_since_the_plan_is_refused",
        ),
        (
            "a template may change after the plan",
            "if template is not None and planned is not None and digest",
            "if template is None and planned is not None and digest",
            "test_a_template_that_changed_since_the_plan_is_refused",
        ),
        (
            "a result took the time of the last attempt",
            "max(context.clock.earlier, Attempts.read(spec.work).earlier_seconds)",
            "context.clock.earlier",
            "test_a_result_took_the_time_of_all_attempts",
        ),
        (
            "running out of memory is a bug of ours",
            "        if is_out_of_memory(error):\n",
            "        if error is None:\n",
            "test_running_out_of_memory_comes_with_advice_that_the_stage_can_take",
        ),
        (
            "what a stage returns is not checked",
            "if not isinstance(result, StageResult):",
            "if result is Ellipsis:",
            "test_what_a_stage_returns_is_checked",
        ),
        (
            "a metric that a kind declares and does not report is not noted",
            "if name not in result.metrics]",
            "if name in result.metrics]",
            "test_a_metric_that_an_outside_kind_declares_and_never_reports_is_noted",
        ),
        (
            "a worker's exit code is not its fault's",
            "_finish(context, FAILED, error.exit_code, str(error), rank=error.rank)",
            "_finish(context, FAILED, 1, str(error))",
            "test_how_a_stage_ended_stands_in_its_status",
        ),
        (
            "a worker that saved says it is done",
            "_finish(context, PREEMPTED, PREEMPTED_CODE,",
            "_finish(context, DONE, 0,",
            "test_how_a_stage_ended_stands_in_its_status",
        ),
        (
            "the last process to fail has the last word",
            "if (folder / STATUS).exists() or (state == DONE and not context.is_main):",
            "if state == DONE and not context.is_main:",
            "test_the_first_process_that_fails_has_the_word",
        ),
    ),
    *in_file(
        "pipeline/backends/command.py",
        "unit/pipeline/backends/test_command.py",
        (
            "every process takes all cores",
            "max(1, num_cores // launch.num_processes)",
            "num_cores",
            "test_threads_are_shared_out_evenly_unless_told",
        ),
        (
            "two runs on one machine meet",
            '["--standalone", "--nnodes", "1"]',
            '["--nnodes", "1"]',
            "test_the_launcher_suits_the_machine",
        ),
    ),
    *in_file(
        "pipeline/backends/environment.py",
        "unit/pipeline/backends/test_environment.py",
        (
            "a worker may go online",
            '"HF_HUB_OFFLINE": "1",',
            '"HF_HUB_OFFLINE": "0",',
            "test_the_worker_is_offline_and_finds_our_package_first",
        ),
        (
            "packages of the user's come before ours",
            "for part in (str(CODE_ROOT), pythonpath) if part)",
            "for part in (pythonpath, str(CODE_ROOT)) if part)",
            "test_the_worker_is_offline_and_finds_our_package_first",
        ),
        (
            "idle threads spin",
            '{"OMP_WAIT_POLICY": "PASSIVE"}',
            '{"OMP_WAIT_POLICY": "ACTIVE"}',
            "test_how_soon_idle_threads_sleep_is_what_was_measured_for_the_processor",
        ),
        (
            "the user's choice of how threads wait is overruled",
            "if any(name in os.environ for name in WAITING_SETTINGS)",
            "if not WAITING_SETTINGS",
            "test_idle_threads_of_a_worker_sleep_unless_the_user_chose_otherwise",
        ),
        (
            "the user's choice for the allocator is overruled",
            "if name not in os.environ},\n        **({}",
            "},\n        **({}",
            "test_what_the_user_has_set_for_the_allocator_stays",
        ),
    ),
    *in_file(
        "core/launcher_variables.py",
        "unit/pipeline/backends/test_processes.py",
        (
            "a worker waits for the caller's group",
            " if name not in RANKS}",
            "}",
            "test_a_process_is_not_taken_for_one_of_the_caller_s_group",
        ),
    ),
    *in_file(
        "pipeline/backends/processes.py",
        "unit/pipeline/backends/test_processes.py",
        (
            "a command does not get the locks that it is to keep",
            "pass_fds=keep_open,",
            "pass_fds=(),",
            "test_a_command_can_keep_a_lock_after_the_one_who_took_it_let_go",
        ),
        (
            "a signal that comes while a launcher starts is lost",
            "            signal.raise_signal(number)\n        while (code := _exit_code(leader))",
            "            pass\n        while (code := _exit_code(leader))",
            "test_a_signal_that_comes_while_the_command_starts_lets_its_worker_save",
        ),
        (
            "a worker is killed without the time to save",
            "            on_stop(stop)\n        tree.wait(grace_seconds)\n",
            "            on_stop(stop)\n",
            "test_an_interrupted_worker_may_save_before_the_call_returns",
        ),
        (
            "a worker hears nothing of a signal to its launcher",
            "            tree.ask_to_stop()\n            tree.wait(grace_seconds)\n",
            "            pass\n",
            "test_a_signal_to_the_launcher_alone_lets_its_worker_save",
        ),
        (
            "a worker that does not stop goes on",
            "    finally:\n        tree.kill()\n        shorten(log)\n",
            "    finally:\n        shorten(log)\n",
            "test_a_worker_that_does_not_stop_is_killed_after_the_grace",
        ),
    ),
    *in_file(
        "pipeline/plan/hostile.py",
        "unit/pipeline/test_compose.py",
        (
            "a configuration reads the environment",
            'if token == ":" and depth:',
            'if token == ":" and depth > 1:',
            "test_what_could_run_code_or_read_the_environment_is_refused",
        ),
        (
            "a configuration runs code",
            'if str(key).split(".")[-1] == "_target_":',
            'if str(key) == "":',
            "test_what_could_run_code_or_read_the_environment_is_refused",
        ),
    ),
    *in_file(
        "pipeline/backends/slurm_jobs.py",
        "unit/pipeline/test_jobs.py",
        (
            "all jobs start at once",
            "after=next(reversed(jobs.values()), None)",
            "after=None",
            "test_each_job_waits_for_the_one_before",
        ),
        (
            "a refused chain leaves its first jobs",
            "if slurm.cancel(list(jobs.values())):",
            "if True:",
            "test_a_refusal_of_slurm_is_shown_and_cancels_what_was_submitted",
        ),
        (
            "a job that was cancelled has failed",
            "Preempted if was_stopped else",
            "StageError if was_stopped else",
            "test_a_job_that_did_not_end_well_ends_the_run_as_its_driver_did",
        ),
        (
            "a job that was cancelled before its driver began has failed",
            "_ASKED_TO_STOP = (PREEMPTED, 143)",
            "_ASKED_TO_STOP = (PREEMPTED,)",
            "test_a_job_that_did_not_end_well_ends_the_run_as_its_driver_did",
        ),
    ),
    *in_file(
        "commands/plan/job_scripts.py",
        "unit/pipeline/test_jobs.py",
        (
            "a plan writes jobs for stages that are done",
            "if stage.has_to_run])",
            "if stage])",
            "test_a_plan_writes_the_bytes_that_a_run_submits_and_submits_nothing",
        ),
    ),
    *in_file(
        "pipeline/sweeps/objectives.py",
        SWEEP,
        (
            "an arm without grades ends the whole sweep",
            "self.arm in grading.left_out for grading",
            "not grading for grading",
            "test_a_trial_whose_arm_has_no_grades_fails_and_ends_no_sweep",
        ),
        (
            "an arm that the sweep trains is taken for one that it does not",
            "stage.input_fingerprints.get(arm) == first.input_fingerprints[arm] for",
            "arm in stage.arms for",
            "test_an_arm_that_the_settings_reach_is_not_shared_even_if_its_value_stays",
        ),
    ),
    *in_file(
        "pipeline/sweeps/study.py",
        SWEEP,
        (
            "more is always better",
            '"minimize" if objective.minimize else "maximize"',
            '"maximize"',
            "test_less_may_be_better",
        ),
        (
            "names of later trials are too long",
            "{runs}.{wanted.number - 1}",
            "{runs}.0",
            "test_names_that_become_too_long_for_later_trials_start_none",
        ),
        (
            "a trial that was cut off counts as failed",
            'return "error" not in trial.user_attrs or',
            "return",
            "test_stopped_in_a_trial_it_goes_on_with_that_one",
        ),
        (
            "other questions are told by the same study",
            'study_name = f"{wanted.name}-{wanted.identity[:16]}"',
            "study_name = wanted.name",
            "test_what_was_found_under_other_settings_is_not_told_as_these",
        ),
        (
            "what is drawn depends on stops",
            "_sampler(config.seed + number, config.trials or 0)",
            "_sampler(config.seed + len(self._study.trials), config.trials or 0)",
            "test_what_is_drawn_does_not_depend_on_stops_in_between",
        ),
    ),
    *in_file(
        "pipeline/sweeps/results.py",
        SWEEP,
        (
            "trials within chance are called worse",
            "if p >= LEVEL or (sum",
            "if (sum",
            "test_the_number_of_trials_counts_in_whether_the_others_are_worse",
        ),
        (
            "trials are judged on a few prompts",
            "if len(best_on_both) >= FEWEST_PROMPTS else []",
            "if best_on_both else []",
            "test_no_verdict_rests_on_fewer_than_ten_prompts",
        ),
        (
            "an arm that differs between trials is shown with the first trial's value",
            "if all(other.get(label) == value for other in measured)",
            "if value is not None",
            "test_arms_that_all_trials_share_are_shown_to_compare_with",
        ),
        (
            "the worst trial stands behind the best",
            "sign = 1 if wanted.objectives[0].minimize else -1\n    return",
            "sign = -1 if wanted.objectives[0].minimize else 1\n    return",
            "test_a_grid_tries_every_value_once_and_names_the_best",
        ),
    ),
    *in_file(
        "pipeline/sweeps/pruning.py",
        SWEEP_AT_ONCE,
        (
            "better curves are pruned",
            "1.0 if self._config.minimize == wanted.objectives[0].minimize else -1.0",
            "-1.0 if self._config.minimize == wanted.objectives[0].minimize else 1.0",
            "test_a_better_curve_is_not_pruned_whichever_way_the_objective_points",
        ),
        (
            "a trial is judged by the curve of an earlier run",
            "if self._former is not None and self._record_file() == self._former:",
            "if False:",
            "test_the_curve_of_an_earlier_run_of_the_same_name_is_not_the_trial_s",
        ),
    ),
    *in_file(
        "evaluation/paired_scores.py",
        "unit/commands/compare/test_driver.py",
        (
            "differences are taken of other prompts",
            "if not scores or scores.keys() != other_scores.keys():",
            "if not scores or len(scores) != len(other_scores):",
            "test_other_prompts_are_not_compared",
        ),
    ),
    *in_file(
        "core/locks.py",
        "unit/core/test_locks.py",
        (
            "a lock keeps nobody out",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            "test_a_second_holder_is_told_who_has_it",
        ),
        (
            "a look at a run keeps it from starting",
            "if is_taken or time.monotonic() > deadline:",
            "if is_taken is not None:",
            "test_whoever_only_looks_keeps_nobody_out",
        ),
    ),
    *in_file(
        "pipeline/execute/run_state.py",
        "unit/pipeline/test_run_state.py",
        (
            "a stage of a killed run seems to be running",
            "replace(record, state=KILLED, stages=stages)",
            "replace(record, state=KILLED)",
            "test_a_killed_run_says_so_with_its_last_sign_of_life_and_what_to_do",
        ),
        (
            "a process that outlives its driver is overlooked",
            'return is_held(work / "lock") or is_held(work / "worker.lock")',
            'return is_held(work / "worker.lock")',
            "test_a_process_that_outlives_its_driver_is_named",
        ),
        (
            "a worker that outlives its launcher is overlooked",
            'return is_held(work / "lock") or is_held(work / "worker.lock")',
            'return is_held(work / "lock")',
            "test_a_worker_that_outlives_its_launcher_is_not_called_killed",
        ),
        (
            "a run of another machine is called killed",
            "if jobs is None or (elsewhere(run_folder) and not slurm_jobs.read_jobs(run_folder)):",
            "if jobs is None:",
            "test_a_run_of_another_machine_is_not_called_killed",
        ),
    ),
    *in_file(
        "core/logs.py",
        "unit/core/test_logs.py",
        (
            "a log that cannot be shortened ends its stage",
            "    with suppress(OSError):  # a stage",
            "    with suppress(FileNotFoundError):  # a stage",
            "test_a_command_is_not_stopped_because_its_log_cannot_be_shortened",
        ),
    ),
    *in_file(
        "pipeline/execute/record.py",
        "unit/pipeline/test_run.py",
        (
            "a wait that is stopped counts as an attempt",
            "return None if began is None else time.monotonic() - began",
            "return time.monotonic() - (began or 0.0)",
            "test_a_wait_that_is_stopped_is_no_attempt",
        ),
        (
            "an error of other settings stays",
            "for file in (STATUS, COST):",
            "for file in ():",
            "test_an_error_and_a_cost_of_other_settings_are_forgotten",
        ),
    ),
    *in_file(
        "pipeline/plan/identity.py",
        "unit/pipeline/test_identity.py",
        (
            "a report is reused whatever evaluation it shows",
            "return {} if list(shown.values()) == evaluations else",
            "return {} if evaluations else",
            "test_which_evaluation_a_report_shows_counts",
        ),
    ),
    *in_file(
        "pipeline/execute/planned_costs.py",
        "unit/pipeline/test_estimates.py",
        (
            "settings are offered that do not fit any more",
            "stage if stage.remedy_peak <= memory else",
            "stage if stage.remedy else",
            "test_a_remedy_is_offered_again_where_it_still_fits",
        ),
    ),
]
