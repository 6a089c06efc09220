"""What a driver says and tries before the first stage."""

from __future__ import annotations

from tests.mutations.mutation import in_file

CALLS = "unit/api/test_calls.py"
REHEARSAL = "unit/pipeline/test_rehearsal.py"
BEYOND = "test_rows_that_a_stage_allows_but_the_model_cannot_read_are_refused"

MUTATIONS = [
    *in_file(
        "rehearse.py",
        REHEARSAL,
        (
            "faulty rows at the beginning end a run that skips such rows",
            " and (whole or data.on_error is OnError.fail):",
            ":",
            "test_rows_that_follow_faulty_ones_may_be_fine_where_faulty_ones_are_skipped",
        ),
    ),
    *in_file(
        "rehearse.py",
        "unit/pipeline/test_rehearsed_models.py",
        ("a prompt's answer needs no positions", "if kind is PROMPTS else 0", "if kind is None else 0", BEYOND),
        ("rows that may not be drawn are refused", "    if not _is_sampled(data):\n", "    if True:\n", BEYOND),
        ("rows longer than the positions pass", "        if tokens > positions:\n", "        if False:\n", BEYOND),
    ),
    *in_file(
        "fork_server.py",
        "unit/pipeline/backends/test_forking.py",
        (
            "a forked stage stays in the server's session",
            "    os.setsid()\n",
            "",
            "test_a_forked_command_is_what_an_executed_one_is",
        ),
        (
            "forked stages remove each other's temporary folders",
            "            tempfile.TemporaryDirectory.__init__(owner)\n",
            "",
            "test_each_child_has_the_temporary_folders_of_libraries_for_itself",
        ),
        (
            "the server holds the lock of a stage that has ended",
            "                for descriptor in (output, *locks):\n                    os.close(descriptor)\n",
            "",
            "test_locks_stay_with_a_child",
        ),
        (
            "a user's code does not find scipy",
            "    unused_libraries.show()\n",
            "",
            "test_libraries_that_others_do_not_need_are_there_for_a_users_code",
        ),
    ),
    *in_file(
        "pipeline/execute/rehearsal.py",
        REHEARSAL,
        (
            "a scorer that asks for its rank is refused",
            "return own | _RANKS if by_torchrun or launch.num_processes > 1 else own",
            "return own",
            "test_a_scorer_finds_the_variables_that_its_launcher_sets",
        ),
        (
            "a rehearsal writes into the folder of the last one",
            "return Path(tempfile.mkdtemp(prefix=_FOLDERS, dir=plan.run_folder))",
            "(plan.run_folder / _FOLDERS).mkdir(); return plan.run_folder / _FOLDERS",
            "test_a_rehearsal_of_a_killed_driver_does_not_answer_for_a_later_one",
        ),
        (
            "what went well is tried again",
            "            rehearsed.remember(plan, stage, part=part)\n",
            "            pass\n",
            "test_what_went_well_is_not_tried_again",
        ),
    ),
    *in_file(
        "stages/evaluate/prompt_lengths.py",
        "unit/pipeline/test_rehearsed_models.py",
        (
            "held-out prompts are measured without their answers",
            "if tokens[longest] + config.max_new_tokens <= positions:",
            "if tokens[longest] <= positions:",
            "test_held_out_prompts_that_are_too_long_are_refused_with_the_longest",
        ),
        (
            "held-out prompts are tried without their tools",
            "prompt_ids(tokenizer, shown(row), row.tools)",
            "prompt_ids(tokenizer, shown(row))",
            "test_held_out_prompts_are_tried_with_their_tools",
        ),
    ),
    *in_file(
        "stages/shared/scalar_check.py",
        "unit/pipeline/test_rehearsed_models.py",
        (
            "a shared critic needs a model with scores",
            'getattr(config, "critic", Critic.separate) is Critic.separate',
            "True",
            "test_a_base_without_scores_is_refused_only_with_a_critic_of_its_own",
        ),
    ),
    *in_file(
        "pipeline/execute/rehearsed.py",
        REHEARSAL,
        (
            "other lengths count as tried",
            '        "max_length",\n',
            "",
            "test_what_went_well_is_not_tried_again",
        ),
    ),
    *in_file(
        "data/turns.py",
        "unit/data/test_formats.py",
        (
            "a weight that Parquet left out is faulty",
            "if weight not in (None, 0, 1):",
            "if weight not in (0, 1):",
            "test_a_weight_of_null_counts_as_absent",
        ),
    ),
    *in_file(
        "pipeline/plan/row_counts.py",
        "unit/pipeline/test_amounts.py",
        (
            "prompts with other calls are one",
            "turn.content, _text(turn.tool_calls))",
            "turn.content)",
            "test_prompts_that_differ_in_tools_or_calls_alone_are_different",
        ),
        (
            "a plan compares texts of any length",
            "        if left < 0:\n",
            "        if left is None:\n",
            "test_a_limited_amount_of_text_is_compared_with_the_evaluation_s",
        ),
        (
            "a warm-up as long as max_steps starts",
            "    if optim.max_steps or rows is None:\n",
            "    if rows is None:\n        return None\n    if optim.max_steps:\n",
            "test_data_that_is_too_little_is_named_exactly",
        ),
    ),
    *in_file(
        "pipeline/plan/compose.py",
        "unit/pipeline/test_notes.py",
        (
            "a smoke run is taken for a real one",
            'profile="" if profile is None else profile.name',
            'profile=""',
            "test_a_smoke_run_says_so_however_it_is_written",
        ),
    ),
    *in_file(
        "pipeline/plan/compose.py",
        "unit/pipeline/test_compose.py",
        (
            "a backend that is chosen is merged with the recipe's own",
            '"launch.backend", backend, merge=False)',
            '"launch.backend", backend, merge=True)',
            "test_a_backend_that_is_chosen_replaces_what_a_recipe_says_of_its_own",
        ),
        (
            "a smoke run counts the processes of one machine",
            'numbers.append(values.get("launch.backend.num_machines", backend.num_machines))',
            "numbers.append(1)",
            "test_a_smoke_run_of_several_processes_has_something_for_each",
        ),
    ),
    *in_file(
        "config/typed.py",
        "unit/pipeline/test_compose.py",
        (
            "a setting of another backend is dropped",
            """self._fault(_join(where, key), f"kind '{kind}' has no such setting; {' or '.join(owners)} has it")""",
            "pass",
            "test_a_faulty_override_is_named_exactly",
        ),
    ),
    *in_file(
        "pipeline/backends/slurm.py",
        "unit/pipeline/test_job_file.py",
        (
            "a job submits itself again",
            "isinstance(backend, SlurmBackend) and backend.submit else None",
            "isinstance(backend, SlurmBackend) else None",
            "test_a_job_of_sharded_processes_asks_for_their_gpus_and_starts_them_itself",
        ),
    ),
    *in_file(
        "pipeline/backends/feasibility.py",
        "unit/pipeline/test_launching.py",
        (
            "GPUs of a job are those of the login node",
            "hardware.count_devices() if submission is None else submission.gpus",
            "hardware.count_devices()",
            "test_a_job_finds_the_gpus_that_it_asked_for",
        ),
    ),
    *in_file(
        "cli.py",
        "unit/test_cli.py",
        (
            "options end the overrides",
            "        arguments.overrides = [*arguments.overrides, *rest]\n",
            "        pass\n",
            "test_options_may_stand_before_between_and_behind_overrides",
        ),
    ),
    *in_file(
        "commands/run/verb.py",
        "unit/test_cli.py",
        (
            "a run waits for nobody",
            "wait=arguments.wait",
            "wait=False",
            "test_a_verb_hands_its_arguments_to_what_does_it",
        ),
    ),
    *in_file(
        "report/run_page/run_layout.py",
        "unit/report/test_page.py",
        (
            "anybody's stage file ends a report",
            "content = yaml_file.read(path)",
            "content = __import__('yaml').safe_load(path.read_text())",
            "test_a_stage_file_without_bounds_does_not_end_a_report",
        ),
    ),
    *in_file(
        "pipeline/plan/hydra_files.py",
        CALLS,
        (
            "a plan ends with the caller's own Hydra gone",
            "            instance.hydra = hydra\n",
            "",
            "test_a_program_that_uses_hydra_itself_finds_its_state_again",
        ),
        (
            "the caller's own Hydra reads files by our rules",
            "            sources[scheme] = source\n",
            "",
            "test_a_program_that_uses_hydra_itself_finds_its_state_again",
        ),
        (
            "two threads share one state of Hydra",
            "    with _IN_USE:\n",
            "    if True:\n",
            "test_threads_plan_at_the_same_time",
        ),
    ),
    *in_file(
        "pipeline/execute/signals.py",
        CALLS,
        (
            "a run in a thread handles signals",
            "if threading.current_thread() is not threading.main_thread():",
            "if False:",
            "test_a_run_in_a_thread_leaves_signals_alone",
        ),
    ),
    *in_file(
        "api/call_surroundings.py",
        CALLS,
        (
            "an interrupted call returns as if it were done",
            "        raise KeyboardInterrupt\n",
            "        return\n",
            "test_ctrl_c_lets_the_stage_save_and_raises",
        ),
    ),
    *in_file(
        "api/loaded_run.py",
        "unit/api/test_loading.py",
        (
            "a stage that is not done has a result",
            "artifact=artifact if manifest is not None else None,",
            "artifact=artifact,",
            "test_a_run_that_is_not_done_says_how_far_it_is",
        ),
    ),
]
