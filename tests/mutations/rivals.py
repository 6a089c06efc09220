"""The benchmark's search of rivals: what is tried, what is chosen, what is counted, and what is refused."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

SEARCH, FIGURES, STOCK, STAGE = (
    f"tests/unit/benchmarks/test_{name}.py" for name in ("search", "figures", "stock", "stage")
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
            "for goal in axis.goals]",
            "for goal in axis.goals[:1]]",
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
            "trial.failure is None and learns_the_same(trial, trials[0], tolerance)",
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
            "compiling is part of what is timed",
            "final or compiled or self",
            "final or self",
            f"{SEARCH}::test_a_trial_without_a_compiler_says_so_and_one_that_compiles_has_a_warm_up",
        ),
        (
            "a trial counts the rows of another step",
            "sharing, warm_up=measurement.warm_up)",
            "sharing)",
            f"{SEARCH}::test_a_trial_without_a_warm_up_counts_the_rows_of_the_first_step",
        ),
    ),
    *_in_benchmarks(
        "searched.py",
        (
            "a search of other rows is taken",
            '"amx", "data", "base", "compiler")',
            '"amx", "base", "compiler")',
            REFUSED,
        ),
        ("a search of another machine is taken", '("processor", "threads",', '("threads",', REFUSED),
        ("a search of another release is taken", "if before.get(package) != version", "if False", REFUSED),
        (
            "a search of another grid is taken",
            'if searched["grid"] != grid_of(work):',
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
