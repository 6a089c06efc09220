"""Faults of the search for the size of micro-batches, and of what is remembered of it."""

from __future__ import annotations

from tests.mutations.mutation import in_file

SEARCH = "unit/training/test_size_search.py"
STAGE = "unit/stages/test_automatic_size.py"
MEMORY, SPEED = (
    "test_a_size_that_takes_more_than_its_share_is_not_tried",
    "test_on_a_cpu_a_larger_size_must_be_faster",
)
LINE, SAME = "test_what_a_size_will_take_lies_on_a_line", "test_it_is_the_stage_with_the_chosen_number"
ANSWERS, ROWS = "test_answers_are_as_long_as_they_can_get", "test_rows_are_the_longest_that_fit"
ONCE, APART = (
    "test_a_size_is_chosen_once_for_all_stages_that_need_as_much_memory",
    "test_what_needs_other_memory_has_a_size_of_its_own",
)
ELSEWHERE, DAMAGED = (
    "test_another_machine_has_a_size_of_its_own",
    "test_a_damaged_file_is_named_in_the_log_and_written_again",
)

MUTATIONS = [
    *in_file(
        "training/size_search.py",
        SEARCH,
        ("no share of the memory is left", "memory = SAFE_SHARE * self.memory", "memory = 1.0 * self.memory", MEMORY),
        ("a size is tried that will not fit", "expected(outcomes, limit) <= memory", "True", MEMORY),
        ("a slower size is chosen", "fitting[-2 if self._is_no_faster(fitting) else -1]", "fitting[-1]", SPEED),
        ("a size that did not fit is chosen", "if size.fits]", "]", "test_out_of_memory_ends_the_search"),
        ("a slope is that of tokens", "(tokens - last.tokens)", "tokens", LINE),
        ("the line falls", "max(0.0, slope)", "slope", LINE),
        (
            "each process takes the free memory of its machine for its own",
            "hardware.free_memory() / sharing",
            "hardware.free_memory()",
            "test_processes_on_a_machine_share_its_free_memory",
        ),
        (
            "every error is a lack of memory",
            "            if not is_out_of_memory(error):\n                raise\n",
            "",
            "test_other_errors_are_not_taken_for_a_lack_of_memory",
        ),
        (
            "sizes grow too fast",
            "size *= 2",
            "size *= 3",
            "test_sizes_are_doubled_from_the_longest_row_up_to_the_largest_micro_batch",
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        STAGE,
        (
            "a batch without answers of a label fails",
            "or len(added) < 2:",
            "or len(added) == 1:",
            "test_a_whole_batch_is_chosen_if_it_fits_and_nothing_of_the_search_stays_in_memory",
        ),
    ),
    *in_file(
        "training/row_trials.py",
        SEARCH,
        ("the first step is on the longest row", "self._tokens.argmin()", "self._tokens.argmax()", ROWS),
        ("the largest micro-batch has all rows", "[-self._most :]", "", ROWS),
    ),
    *in_file(
        "stages/ppo/answer_trials.py",
        SEARCH,
        ("the shortest prompt comes first", "[ascending[-1], *ascending[:-1]]", "ascending", ANSWERS),
        ("shared prompts count", "len(row) * (not is_shared)", "len(row)", ANSWERS),
        ("one row too many", "tokens <= limit for", "tokens <= limit + 1 for", ANSWERS),
        ("the optimiser takes no step", "        trainer.optimizer.step()\n", "", ANSWERS),
    ),
    *in_file(
        "stages/shared/automatic_size.py",
        STAGE,
        (
            "random numbers are those after the search",
            'torch.random.fork_rng([device] if device.type == "cuda" else [])',
            "torch.random.fork_rng(enabled=False)",
            "test_random_numbers_are_as_before",
        ),
        (
            "Python's random numbers are those after the search",
            "    random.setstate(before[0])\n",
            "",
            "test_random_numbers_are_as_before",
        ),
        (
            "the first models stay in memory",
            "    free_unused()\n",
            "",
            "test_a_whole_batch_is_chosen_if_it_fits_and_nothing_of_the_search_stays_in_memory",
        ),
        ("a number of another machine is taken", "if (size.machine, size.launch) == here", "if True", ELSEWHERE),
        ("a stage forgets its own number", "        return begun[0]\n", "        pass\n", ELSEWHERE),
    ),
    *in_file(
        "stages/shared/reference_cache.py",
        STAGE,
        ("a search stores its reference", "is_final = context.search is None and", "is_final =", SAME),
    ),
    *in_file(
        "stages/distil/run.py",
        STAGE,
        ("a search stores its figures", " or context.search is not None:", ":", SAME),
    ),
    *in_file(
        "job.py",
        STAGE,
        ("rates count", "value != 0.0 if isinstance(value, float) else value", "value", ONCE),
        ("times count", '"max_steps", "updates", "log_every"', '"updates", "log_every"', ONCE),
        ("the rows do not count", '("base", "data", "extra_data")}', '("base", "extra_data")}', APART),
        ("the base does not count", '("base", "data", "extra_data")}', '("data", "extra_data")}', APART),
        (
            "folders count",
            " if name not in _PATHS}",
            "}",
            "test_weights_and_folders_of_a_model_do_not_count",
        ),
    ),
    *in_file(
        "records/chosen_sizes.py",
        STAGE,
        (
            "a damaged file ends the stage",
            "    except ArtifactError as error:\n",
            "    except OSError as error:\n",
            DAMAGED,
        ),
        (
            "a number below 1 is taken",
            "if size.tokens > 0]",
            "]",
            "test_a_size_that_is_no_size_is_chosen_again",
        ),
    ),
]
