"""Trackers: names, the thread that sends, and what a plan refuses."""

from __future__ import annotations

from tests.mutations.mutation import in_file

MUTATIONS = [
    *in_file(
        "training/trackers/sender.py",
        "unit/training/test_sender.py",
        (
            "a server that is away for a moment is given up",
            "if self._ending.is_set() or not self._may_pass(error):",
            "if error:",
            "test_what_failed_is_sent_again_in_order_and_an_outage_is_said_once",
        ),
        (
            "the end of a stage waits until a server is back",
            "if self._ending.is_set() or not self._may_pass(error):",
            "if not self._may_pass(error):",
            "test_the_end_of_a_stage_waits_for_no_server_that_does_not_answer",
        ),
    ),
    *in_file(
        "training/trackers/curve_names.py",
        "unit/training/test_tracking.py",
        (
            "trackio renames a curve by itself",
            '"timestamp", "run", "project", "metrics"',
            '"timestamp"',
            "test_a_curve_has_one_name_in_all_trackers_whatever_one_of_them_reserves_or_refuses",
        ),
    ),
    *in_file(
        "pipeline/plan/tracking_checks.py",
        "unit/pipeline/test_tracking_checks.py",
        (
            "MLflow's address holds a password",
            "if not url and not TRACKING_URL.holds(named):",
            "if not named:",
            "test_settings_that_contradict_are_refused",
        ),
    ),
    *in_file(
        "training/session.py",
        "unit/training/test_ppo_limits.py",
        (
            "trackers get no answers of PPO",
            '        context.trackers.table("samples", MetricsLog(context.content / "samples.jsonl").rows())\n',
            "        pass\n",
            "test_a_few_answers_of_every_update_can_be_read",
        ),
    ),
    *in_file(
        "stages/sample/run.py",
        "unit/stages/test_sample.py",
        (
            "trackers get no sampled answers",
            '        context.trackers.table("samples", samples)\n',
            "",
            "test_trackers_get_every_answer",
        ),
    ),
]
