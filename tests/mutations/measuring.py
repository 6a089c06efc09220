"""Stages that measure on several processes: how their work is split, gathered, stored and launched."""

from __future__ import annotations

from tests.mutations.mutation import in_file

TOGETHER, LOGPROBS = "distributed/test_measuring.py", "unit/stages/test_policy_logprobs.py"
EVALUATE, LAUNCHING, JOBS = (
    "unit/stages/test_evaluate.py",
    "unit/pipeline/test_launching.py",
    "unit/pipeline/test_job_file.py",
)
FORGOTTEN, CARD, JUDGED = (
    "test_what_was_forgotten",
    "test_a_reward_card",
    "test_a_judge_is_asked_by_the_first_process_alone",
)
PARTS = "test_parts_make_what_one_batch_makes"
OF_ITS_POLICY = "test_each_row_has_the_log_probability_of_its_policy"
MEASURES = "test_a_stage_that_measures_runs_on_all_processes_without_sharding"

MUTATIONS = [
    *in_file(
        "stages/shared/process_shares.py",
        TOGETHER,
        (
            "all processes take the first share",
            "for number in (context.rank, context.rank + 1))",
            "for number in (0, 1))",
            FORGOTTEN,
        ),
        (
            "shares are gathered in another order",
            "for values in shared(lambda: values_of(share) if share else []) for",
            "for values in shared(lambda: values_of(share) if share else [])[::-1] for",
            FORGOTTEN,
        ),
        (
            "a part of a card is left out",
            "share = items[first:end]",
            "share = items[first : end - context.rank]",
            CARD,
        ),
        (
            "all processes do what the first does for all",
            "own_of_all(lambda: make() if context.is_main else None)",
            "own_of_all(make)",
            JUDGED,
        ),
    ),
    *in_file(
        "stages/shared/policy_logprobs.py",
        LOGPROBS,
        (
            "answers of another micro-batch are read",
            "rows.answers[some]))",
            "rows.answers[: len(span)]))",
            OF_ITS_POLICY,
        ),
        (
            "one policy reads the rows of all",
            "model = policies.load(rows.policy)",
            "model = policies.load(next(iter(asked.values())).policy)",
            OF_ITS_POLICY,
        ),
    ),
    *in_file(
        "stages/evaluate/answering.py",
        EVALUATE,
        (
            "answers stay in the order of their parts",
            "ids=[ids[index] for index in range(len(ids))],",
            "ids=list(ids.values()),",
            PARTS,
        ),
        (
            "references are read behind other prompts",
            "[texts[index] for index in part],",
            "texts[: len(part)],",
            PARTS,
        ),
        (
            "each part draws the first random numbers",
            "uniforms=sampling.uniforms[list(part)]",
            "uniforms=sampling.uniforms[: len(part)]",
            PARTS,
        ),
        (
            "parts of all arms are stored under the same name",
            "[[missing[index][1].name, part] for index, part in parts],",
            "[part for _, part in parts],",
            "test_log_ratios_and_rewards_of_every_arm_are_its_own_by_value",
        ),
        (
            "one arm answers at once on all processes",
            "return context.world_size // math.gcd(context.world_size, batches)",
            "return 1",
            "test_so_many_arms_answer_at_once_that_all_processes_have_as_much_to_do",
        ),
    ),
    *in_file(
        "stages/evaluate/answering.py",
        TOGETHER,
        (
            "answers are not cached",
            "            answer_cache.write(file, answers)\n",
            "            pass\n",
            "test_cached_answers_are_made_by_no_process",
        ),
    ),
    *in_file(
        "pipeline/backends/feasibility.py",
        LAUNCHING,
        (
            "a stage that measures is sharded",
            "return command.with_processes(plain, num_devices=num_devices)",
            "return command.with_processes(launch, num_devices=num_devices)",
            MEASURES,
        ),
        (
            "a stage that measures runs on one process",
            "    if runs_on is RunsOn.replicas:\n",
            "    if runs_on is RunsOn.driver:\n",
            MEASURES,
        ),
    ),
    *in_file(
        "pipeline/backends/slurm_job_file.py",
        JOBS,
        (
            "a job of an evaluation has one machine",
            "launch.runs_on.on_all else 1",
            "trains else 1",
            "test_a_job_of_several_machines_asks_for_them_only_where_a_stage_uses_them",
        ),
    ),
]
