"""Validation while training: what is looked at, what is decided, what is handed on."""

from __future__ import annotations

from tests.mutations.mutation import in_file

STAGES = "unit/stages/test_validation.py"
TOGETHER = "distributed/test_validation.py"
LEAST = "test_the_step_with_the_least_held_out_loss_is_handed_on"
KILLED = "test_a_killed_stage_hands_on_the_same_bytes"

MUTATIONS = [
    *in_file(
        "training/held_out.py",
        STAGES,
        (
            "a look drops activations",
            "    model.eval()\n",
            "    model.train()\n",
            "test_a_look_has_no_dropout_and_counts_learned_tokens_whatever_the_micro_batches[False]",
        ),
        (
            "a look counts its micro-batches alike",
            "            loss += loss_of_part * items\n",
            "            loss, items = loss + loss_of_part, 1.0\n",
            "test_a_look_has_no_dropout_and_counts_learned_tokens_whatever_the_micro_batches[False]",
        ),
    ),
    *in_file(
        "training/held_out.py",
        TOGETHER,
        (
            "held-out rows that all processes compute count once for each",
            "accelerator.num_processes if part.by_all else 1",
            "1",
            "test_two_processes_hand_on_what_one_hands_on[sft-lora-none-0.1]",
        ),
        (
            "the last batch of training rows cuts what a look gathers",
            "with _in_evaluation_mode(model), outside_of_data_loaders(accelerator):",
            "with _in_evaluation_mode(model):",
            "test_at_the_end_of_the_training_rows_every_held_out_pair_counts",
        ),
    ),
    *in_file(
        "stages/reward/run.py",
        STAGES,
        (
            "validation sees the pairs that eval_accuracy is of",
            ", reported=held_out)",
            ")",
            "test_a_pair_that_a_reward_model_reports_on_is_not_looked_at",
        ),
    ),
    *in_file(
        "training/looks.py",
        STAGES,
        (
            "the step with the largest held-out loss is handed on",
            "improved = loss < self.best_loss",
            "improved = loss > self.best_loss or self.best_loss == math.inf",
            f"{LEAST}[dpo]",
        ),
        (
            "the best weights are not put back",
            "            self._best.restore()\n",
            "            pass\n",
            f"{LEAST}[sft]",
        ),
        (
            "patience counts every look",
            "self.best_step, self.best_loss, self.since_best = step, loss, 0",
            "self.best_step, self.best_loss, self.since_best = step, loss, self.since_best + 1",
            "test_patience_ends_the_stage_and_the_sentence_says_where",
        ),
        (
            "the last step is not looked at",
            "return state.global_step % self._config.every == 0 or state.global_step == state.max_steps",
            "return state.global_step % self._config.every == 0",
            "test_without_keep_best_the_last_step_is_handed_on_with_its_own_loss",
        ),
    ),
    *in_file(
        "training/looks.py",
        TOGETHER,
        (
            "a checkpoint lacks the looks so far",
            'self.looks = Looks(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))',
            "self.looks = Looks()",
            f"{KILLED}[sft-full-none-16]",
        ),
        (
            "a stage that its patience ended leaves no checkpoint of its end",
            "control.should_save = control.should_training_stop = True",
            "control.should_training_stop = True",
            "test_a_stage_that_its_patience_ended_takes_no_step_more_when_it_goes_on",
        ),
        (
            "a stage that its patience ended goes on",
            "        if self.looks.out_of_patience:\n            raise NothingLeft",
            "        if self.looks.last_step < 0:\n            raise NothingLeft",
            "test_a_stage_that_its_patience_ended_takes_no_step_more_when_it_goes_on",
        ),
    ),
    *in_file(
        "training/session.py",
        STAGES,
        (
            "the figures are those of the last step, whichever is handed on",
            '[row for row in rows if row["step"] <= validation.handed_on]',
            "rows",
            f"{LEAST}[dpo]",
        ),
    ),
    *in_file(
        "stages/shared/by_prompt.py",
        STAGES,
        (
            "rows are held out, whatever their prompts",
            "    prompt_of = _by_record(rows, prompts_of(rows))\n",
            '    prompt_of = [index.to_bytes(4, "big") for index in range(len(rows))]\n',
            "test_no_prompt_is_on_both_sides",
        ),
    ),
    *in_file(
        "stages/shared/validation_rows.py",
        STAGES,
        (
            "what is learned from is held out too",
            "    if shared:\n",
            "    if shared < 0:\n",
            "test_a_row_that_is_learned_from_is_not_held_out",
        ),
    ),
    *in_file(
        "core/fingerprint.py",
        "unit/pipeline/test_validation_checks.py",
        (
            "settings that nobody made change every fingerprint",
            "return bool(canonical(getattr(config, field.name)) != canonical(default))",
            "return True",
            "test_settings_at_their_defaults_are_no_part_of_a_fingerprint",
        ),
    ),
    *in_file(
        "pipeline/sweeps/pruning.py",
        "unit/pipeline/sweeps/test_sweep_at_once.py",
        (
            "a sweep ends at a step before the first look",
            "if rows and not comes_later and not any(",
            "if rows and not any(",
            "test_a_trial_is_pruned_by_its_held_out_loss_which_its_first_step_does_not_show",
        ),
    ),
]
