"""Benchmarks: what the harness is answered, and what a plan sees of its tasks."""

from __future__ import annotations

from tests.mutations.mutation import in_file

STAGE = "unit/stages/test_benchmark.py"
PLAN = "unit/pipeline/test_benchmarks.py"
LIKE_THE_HARNESS = "test_contexts_are_cut_and_begun_as_by_the_harness"

MUTATIONS = [
    *in_file(
        "stages/benchmark/harness_model.py",
        STAGE,
        (
            "a context is cut one token too soon",
            "ids = [*context, *continuation][-(self.max_length + 1) :]",
            "ids = [*context, *continuation][-self.max_length :]",
            LIKE_THE_HARNESS,
        ),
        (
            "a text that begins with BOS gets another",
            "add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))",
            "add_special_tokens = True",
            "test_a_second_bos_is_not_added",
        ),
        (
            "a continuation is greedy if one of its tokens is",
            "is_top1.all().to(sums[0])",
            "is_top1.any().to(sums[0])",
            "test_a_continuation_is_greedy_if_every_token_is_the_likeliest",
        ),
        (
            "choices of one token are read once each",
            "by_tokens([len(read) for read in reads], tokens, behind=_not_shared(reads))",
            "by_tokens([tokens + 1 for read in reads], tokens)",
            "test_what_requests_have_in_common_is_read_once",
        ),
    ),
    *in_file(
        "stages/benchmark/answer_ends.py",
        STAGE,
        (
            "a stop text counts only where a token is all of it",
            "self._tokenizer.decode(list(answer[-self._tail :]), skip_special_tokens=False)",
            "self._tokenizer.decode(list(answer[-1:]), skip_special_tokens=False)",
            "test_an_answer_ends_before_a_stop_text_that_several_tokens_make",
        ),
        (
            "a control token is no stop text",
            "self._tokenizer.decode(list(answer[-self._tail :]), skip_special_tokens=False)",
            "self._tokenizer.decode(list(answer[-self._tail :]), skip_special_tokens=True)",
            "test_a_control_token_may_be_a_stop_text",
        ),
    ),
    *in_file(
        "stages/benchmark/harness_tasks.py",
        STAGE,
        (
            "the next arm gets other examples",
            "        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)\n",
            "        task.set_fewshot_seed(seed=None)\n",
            "test_every_arm_gets_the_same_examples",
        ),
    ),
    *in_file(
        "stages/benchmark/harness_run.py",
        STAGE,
        (
            "a right answer that is no choice counts as a wrong one",
            "            if target not in range(len(choices)) if isinstance(target, int) else target not in choices:",
            "            if False:",
            "test_a_right_answer_that_is_not_a_choice_is_refused",
        ),
        (
            "a metric of some rows is a score of each",
            "= [sample.get(metric) for sample in samples if",
            "= [sample[metric] for sample in samples if metric in sample and",
            "test_a_metric_that_only_some_rows_have_is_no_score_of_each_row",
        ),
    ),
    *in_file(
        "stages/benchmark/run.py",
        STAGE,
        (
            "rows of several tasks are left out without a word",
            '"rows_left_out": float(sum(task.all_rows for task in leaves) - rows)',
            '"rows_left_out": 0.0',
            "test_a_limit_makes_its_figures_worthless_and_says_so",
        ),
        (
            "trackers get no values of benchmarks",
            '    context.trackers.table("benchmarks", _table(record))\n',
            "",
            "test_trackers_get_a_row_for_each_value",
        ),
        (
            "trackers get no answers to benchmarks",
            '    context.trackers.table("samples", [to_json(row) for row in rows])\n',
            "",
            "test_trackers_get_a_row_for_each_value",
        ),
    ),
    *in_file(
        "stages/benchmark/kind.py",
        PLAN,
        (
            "data beside the tasks' folders is not covered",
            '            hashes[f"data of {task.name}"] = digest([content_sha256(file) for file in outside])\n',
            "            pass\n",
            "test_data_elsewhere_and_the_harness_s_version_are_covered_too",
        ),
        (
            "included files and functions beside the tasks' folders are not covered",
            '            hashes[f"files of {task.name}"] = digest([file_sha256(file) for file in outside])\n',
            "            pass\n",
            "test_what_a_task_reads_beside_its_folder_and_hidden_data_in_it_are_covered_too",
        ),
        (
            "hidden data in a tasks' folder are not covered",
            " and not _is_by_product(file.relative_to(folder))",
            "",
            "test_what_a_task_reads_beside_its_folder_and_hidden_data_in_it_are_covered_too",
        ),
        (
            "code that Python compiled changes a fingerprint",
            'any(part.startswith(".") or part in SKIPPED for part in name.parts)',
            "False",
            "test_a_result_depends_on_what_the_files_hold_and_not_on_where_they_are",
        ),
    ),
    *in_file(
        "evaluation/significance.py",
        "unit/evaluation/test_comparisons.py",
        (
            "p values of metrics over other prompts are mixed up",
            "            p_values[index] = p\n",
            "            p_values[-1 - index] = p\n",
            "test_metrics_over_other_prompts_are_one_family",
        ),
    ),
]
