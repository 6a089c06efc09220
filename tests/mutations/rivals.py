"""The benchmark's search of rivals: what is tried, what is chosen, what is counted, and what is refused."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

SEARCH, FIGURES, STOCK, STAGE, HARNESS, CONTESTANTS = (
    f"tests/unit/benchmarks/test_{name}.py"
    for name in ("search", "figures", "stock", "stage", "harness", "contestants")
)
AXES = f"{SEARCH}::test_each_axis_is_tried_from_the_fastest_and_from_the_leanest_so_far"
UNLIKE = f"{SEARCH}::test_a_setting_that_learns_something_else_is_not_chosen"
REFUSED = f"{SEARCH}::test_a_search_of_other_circumstances_is_refused"
SAME_LOSS = f"{STOCK}::test_no_setting_changes_a_loss"


def _in_benchmarks(file: str, *entries: tuple[str, str, str, str]) -> list[Mutation]:
    return [
        Mutation(name=name, file=f"benchmarks/{file}", old=old, new=new, test=test) for name, old, new, test in entries
    ]


MUTATIONS = [
    *_in_benchmarks(
        "search.py",
        (
            "axes are tried from the fastest setting alone",
            "for goal in group[0].goals]",
            "for goal in group[0].goals[:1]]",
            AXES,
        ),
        (
            "the fastest setting is the slowest",
            "-trial.speed if goal == FASTEST",
            "trial.speed if goal == FASTEST",
            AXES,
        ),
        (
            "a rival is chosen by its short trials",
            "{goal: best(finals, goal, tolerance).setting for goal in GOALS}",
            "{goal: best(first, goal, tolerance).setting for goal in GOALS}",
            f"{SEARCH}::test_the_second_pass_decides",
        ),
        (
            "a rival that learns something else is chosen",
            "trial.failure is None and does_the_same(trial, trials[0], tolerance)",
            "trial.failure is None",
            UNLIKE,
        ),
        ("losses may fall by any amount", "abs(loss - reference) <=", "loss - reference <=", UNLIKE),
        (
            "losses are compared with a trial that was shorter",
            "best(finals, goal, tolerance).setting",
            "best([first[0], *finals], goal, tolerance).setting",
            UNLIKE,
        ),
        (
            "the first round of a setting counts",
            "max(trial.speed for trial in able)",
            "able[0].speed",
            f"{SEARCH}::test_the_best_round_of_a_setting_counts",
        ),
        (
            "a rival may sample any number of tokens",
            "if trial.answers is None or start.answers is None:",
            "if True:",
            f"{SEARCH}::test_a_setting_that_samples_other_numbers_of_tokens_is_not_chosen",
        ),
    ),
    *_in_benchmarks(
        "grid.py",
        (
            "joined axes are tried one after another",
            "        if axis.joined:",
            "        if False:",
            f"{SEARCH}::test_joined_axes_are_tried_in_all_combinations",
        ),
        (
            "a rival's precision has a name that no contestant reads",
            'Axis(name="precision"',
            'Axis(name="numbers"',
            f"{CONTESTANTS}::test_a_contestant_reads_each_value_of_its_setting",
        ),
    ),
    *_in_benchmarks(
        "measurement.py",
        (
            "rivals may not compile",
            "{NO_COMPILING} if measurement.compiles else set()",
            "set()",
            f"{HARNESS}::test_a_rival_whose_setting_compiles_may_compile",
        ),
        (
            "a setting that compiles nothing is measured",
            'if measurement.compiles and not result["compiled_graphs"]:',
            "if False:",
            f"{HARNESS}::test_a_measurement_in_which_nothing_was_compiled_has_failed",
        ),
        (
            "losses of steps that compile count",
            '{"losses": result["losses"][: measurement.steps]}',
            '{"losses": result["losses"]}',
            f"{HARNESS}::test_a_measurement_in_which_nothing_was_compiled_has_failed",
        ),
        (
            "compiling is part of what is timed",
            '"warm_up": measurement.steps_while_compiling + measurement.warm_up',
            '"warm_up": measurement.warm_up',
            f"{SEARCH}::test_a_trial_without_a_compiler_says_so_and_one_that_compiles_goes_through_its_rows_first",
        ),
    ),
    *_in_benchmarks(
        "harness.py",
        (
            "each contestant runs behind the same one",
            "step = -1 if repetition % 2 else 1",
            "step = 1",
            f"{HARNESS}::test_nobody_is_always_first_or_behind_the_same_contestant",
        ),
    ),
    *_in_benchmarks(
        "contestants/training.py",
        (
            "no rival is spared its input casts",
            "spared else nullcontext()",
            "False else nullcontext()",
            f"{CONTESTANTS}::test_each_precision_is_a_pair_of_autocast_and_input_casts",
        ),
    ),
    *_in_benchmarks(
        "stage.py",
        (
            "ours has another rank than the rivals",
            'rank=int(str(LORA["r"]))',
            "rank=8",
            f"{CONTESTANTS}::test_rivals_train_with_our_hyperparameters",
        ),
        (
            "our reference is computed beforehand",
            "precompute_reference=False",
            "precompute_reference=True",
            f"{CONTESTANTS}::test_rivals_train_with_our_hyperparameters",
        ),
    ),
    *_in_benchmarks(
        "search_run.py",
        (
            "slow updates are fast",
            'pace if work.quantity == "tokens_per_second" else 1 / pace',
            "pace",
            f"{SEARCH}::test_a_library_whose_updates_take_less_time_is_faster",
        ),
        (
            "a trial counts the rows of another step",
            "peak=peak, warm_up=warm_up)",
            "peak=peak)",
            f"{SEARCH}::test_a_trial_without_a_warm_up_counts_the_rows_of_the_first_step",
        ),
    ),
    *_in_benchmarks(
        "searched.py",
        (
            "a search of other rows is taken",
            '"amx", "data", "base", "compiler", "launcher")',
            '"amx", "base", "compiler", "launcher")',
            REFUSED,
        ),
        ("a search of another machine is taken", '("processor", "threads",', '("threads",', REFUSED),
        ("a search of another release is taken", "if before.get(package) != version", "if False", REFUSED),
        (
            "a search of another grid is taken",
            'if searched["grid"] != grid_of(work) or',
            "if",
            f"{SEARCH}::test_a_missing_search_and_one_of_another_grid_are_refused",
        ),
        (
            "a search of other code of the rivals is taken",
            'if searched.get("code") != code_of(work):',
            "if False:",
            f"{SEARCH}::test_a_missing_search_and_one_of_another_grid_are_refused",
        ),
    ),
    *_in_benchmarks(
        "work.py",
        (
            "a critic is trained as TRL does by itself",
            "setting={**self.fixed, **setting}",
            "setting=setting",
            f"{SEARCH}::test_a_rival_keeps_what_no_search_changes",
        ),
        (
            "one setting takes part twice",
            "        if same is None:",
            "        if True:",
            f"{SEARCH}::test_a_default_that_is_also_the_fastest_takes_part_once",
        ),
    ),
    *_in_benchmarks(
        "figures.py",
        (
            "the warm-up's rows are counted",
            "steps[(warm_up + step) % len(steps)]",
            "steps[step % len(steps)]",
            f"{FIGURES}::test_each_measured_step_counts_its_own_rows_and_the_warm_up_none",
        ),
        (
            "a rival's best is its slowest",
            "sign = -1 if quantity",
            "sign = 1 if quantity",
            f"{FIGURES}::test_a_library_at_its_best_is_its_fastest_row_in_speed_and_its_leanest_in_memory",
        ),
        (
            "a peak that was measured while a core was busy counts",
            "max(peak, highest.get(dtype, 0.0))",
            "peak",
            f"{FIGURES}::test_the_share_of_the_peak_is_that_of_the_highest_peak_in_a_number_format",
        ),
        (
            "the last loss is not compared",
            'for name in ("first_loss", "last_loss")',
            'for name in ("first_loss",)',
            f"{FIGURES}::test_a_rival_that_learns_something_else_is_seen_in_its_first_or_last_loss",
        ),
    ),
    *_in_benchmarks(
        "counts.py",
        (
            "padding is not counted",
            "sum(lengths) if setting",
            "sum(lengths) if True or setting",
            f"{SEARCH}::test_padding_is_counted_to_the_longest_row_of_each_micro_batch",
        ),
    ),
    *_in_benchmarks(
        "prepare.py",
        (
            "others take rows in the order of the file",
            "return [tokens[index] for index in order]",
            "return [tokens[index] for index in sorted(order)]",
            f"{STAGE}::test_others_take_rows_in_the_order_of_our_trainer",
        ),
    ),
    *_in_benchmarks(
        "contestants/stock.py",
        (
            "a plain loop weighs micro-batches alike",
            "return total / labels_of_all",
            "return total / sum(label != IGNORED for row in rows for label in row['labels'][1:])",
            SAME_LOSS,
        ),
        (
            "a plain loop divides KTO's divergence by the rows of a micro-batch",
            "(total / len(batch.rows)).clamp(min=0)",
            "(total / len(part)).clamp(min=0)",
            SAME_LOSS,
        ),
        (
            "rows without padding see each other",
            'return labels_tensor, {"input_ids": ids_tensor, "position_ids": positions_tensor}',
            'return labels_tensor, {"input_ids": ids_tensor}',
            f"{STOCK}::test_rows_without_padding_do_not_see_each_other",
        ),
    ),
]
