"""How a student learns from a teacher, and what is reported of it."""

from __future__ import annotations

from tests.mutations.mutation import in_file

DIVERGENCE, STAGE, DRAFTS = (
    "unit/models/test_divergence.py",
    "unit/stages/test_distil.py",
    "unit/stages/test_drafts.py",
)
_LOOPS = "test_divergence_and_acceptance_equal_the_slow_loops"
_GRADIENT = "test_the_gradient_is_that_of_the_slow_loops"
_PAPERS = "test_the_loss_and_its_gradient_are_those_of_the_papers"
_RECORD = "test_the_record_is_of_the_student_before_and_as_it_was_saved"
_ANSWERS = "test_the_teacher_answers_and_no_prompt_is_both_learned_and_held_out"
_EXPECTED = "test_expected_speed_ups_follow_from_acceptance_and_the_measured_cost_of_a_pass"

MUTATIONS = [
    *in_file(
        "models/forward/divergence.py",
        DIVERGENCE,
        ("the divergence is the reverse one", "log_p.sub_(log_q).mul_(p)", "log_q.sub_(log_p).mul_(q)", _LOOPS),
        ("the divergence has the other sign", "log_p.sub_(log_q).mul_(p)", "log_q.sub(log_p).mul_(p)", _LOOPS),
        ("acceptance is the larger probability", "torch.minimum(q, p, out=log_q)", "torch.maximum(q, p)", _LOOPS),
        ("the temperature of a divergence is ignored", "if temperature != 1.0:", "if False:", _LOOPS),
        (
            "agreement compares a student with itself",
            "log_q.argmax(-1) == log_p.argmax(-1)",
            "log_q.argmax(-1) == log_q.argmax(-1)",
            _LOOPS,
        ),
        (
            "a frozen head's gradient has the other sign",
            "products.copy_(q.sub_(p))\n",
            "products.copy_(p - q)\n",
            _GRADIENT,
        ),
        (
            "a trained head's gradient has the other sign",
            "products.copy_(q.sub_(p).mul_(factors[rows, None]))",
            "products.copy_((p - q).mul_(factors[rows, None]))",
            _GRADIENT,
        ),
        (
            "a divergence's gradient ignores the temperature",
            "factors = (grad / ctx.temperature).float()",
            "factors = grad.float()",
            _GRADIENT,
        ),
        (
            "acceptance has a gradient",
            "ctx.mark_non_differentiable(acceptance, is_same_top)",
            "ctx.mark_non_differentiable(is_same_top)",
            "test_only_the_divergence_carries_a_gradient",
        ),
        (
            "a head's gradient is that of the last chunk",
            "grad_weight += slopes.T @ hidden[chunk]",
            "grad_weight = slopes.T @ hidden[chunk]",
            _GRADIENT,
        ),
    ),
    *in_file(
        "models/forward/distilled.py",
        STAGE,
        (
            "prompts of a student are learned too",
            "(given[:, 1:] != IGNORED) & is_real[:, 1:]",
            "is_real[:, 1:]",
            _PAPERS,
        ),
        (
            "a state is compared where its own token stands",
            "index[:, :-1][predicts]",
            "index[:, 1:][predicts]",
            _PAPERS,
        ),
    ),
    *in_file(
        "models/forward/distilled.py",
        DRAFTS,
        (
            "heads of other sizes are compared",
            "if sizes[0] != sizes[1]:",
            "if False:",
            "test_heads_of_other_sizes_or_with_scaled_logits_are_refused",
        ),
    ),
    *in_file(
        "stages/distil/distil_trainer.py",
        STAGE,
        (
            "the student is its own teacher",
            "teaching_at(self.teacher, rows, indices)",
            "teaching_at(self.model, rows, indices)",
            _PAPERS,
        ),
        ("the loss's temperature is 1", "temperature=self.temperature", "temperature=1.0", _PAPERS),
        (
            "the loss is the mean of a micro-batch",
            "len(indices) if num_items_in_batch is None else num_items_in_batch",
            "len(indices)",
            _PAPERS,
        ),
        (
            "acceptance is that of the last micro-batch",
            "self._sums += torch.stack",
            "self._sums = torch.stack",
            _PAPERS,
        ),
    ),
    *in_file(
        "stages/distil/distil_trainer.py",
        "distributed/test_distil.py",
        (
            "each process learns from its own share alone",
            "loss = loss * self.accelerator.num_processes",
            "loss = loss * 1",
            "test_two_processes_train_the_student_of_one",
        ),
        (
            "acceptance is that of one process",
            'self.accelerator.reduce(self._sums, reduction="sum").tolist()',
            "self._sums.tolist()",
            "test_two_processes_train_the_student_of_one",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "distributed/test_distil.py",
        (
            "what is loaded after training is read in shards",
            "    unset_hf_deepspeed_config()\n",
            "    pass\n",
            "test_two_processes_train_the_student_of_one",
        ),
    ),
    *in_file(
        "models/assembly/first_layers.py",
        "unit/models/test_first_layers.py",
        (
            "the last layers are kept",
            "list(available)[:layers]",
            "list(available)[-layers:]",
            "test_it_has_the_states_after_these_layers_under_the_same_norm_and_head",
        ),
        (
            "a saved model of the first layers has all of them",
            "    config.num_hidden_layers = layers\n",
            "",
            "test_it_has_the_states_after_these_layers_under_the_same_norm_and_head",
        ),
    ),
    *in_file(
        "stages/distil/taught_rows.py",
        STAGE,
        ("a row's prompt is learned", "[IGNORED] * len(prompt) + answer", "prompt + answer", _ANSWERS),
        (
            "held-out answers are learned too",
            "rows.select(learned, keep_in_memory=True)",
            "rows.select(range(len(rows)), keep_in_memory=True)",
            _ANSWERS,
        ),
        (
            "each answer is a prompt of its own",
            "number[row // config.completions_per_prompt]",
            "row",
            _ANSWERS,
        ),
    ),
    *in_file(
        "stages/distil/student_comparison.py",
        STAGE,
        ("what is reported ignores the temperature", "temperature=config.temperature,", "temperature=1.0,", _RECORD),
        (
            "prompts count alike in what is reported",
            "intervals.of_ratio(values.tolist(), tokens.tolist())",
            "intervals.of((values / tokens).tolist())",
            "test_whole_prompts_are_drawn_for_the_intervals_and_every_token_counts_alike",
        ),
        ("tokens of a step ignore gamma", "tokens_per_step(alpha, gamma)", "tokens_per_step(alpha, 4)", _RECORD),
    ),
    *in_file(
        "stages/distil/run.py",
        STAGE,
        (
            "the student after is the student before",
            '_figures(config, context, student, teacher, held_out, when="after")',
            '_figures(config, context, start, teacher, held_out, when="after")',
            _RECORD,
        ),
        (
            "the loss has the temperature of sampling",
            "trainer.teacher, trainer.temperature = teacher, config.loss_temperature",
            "trainer.teacher, trainer.temperature = teacher, config.temperature",
            _PAPERS,
        ),
        (
            "sequences are learned by the teacher's distribution",
            "if config.method.needs_teacher:",
            "if True:",
            "test_sequence_level_distillation_learns_the_answers_alone",
        ),
        (
            "before and after change places in the manifest",
            '((BEFORE, before), ("", after))',
            '((BEFORE, after), ("", before))',
            _RECORD,
        ),
    ),
    *in_file(
        "stages/distil/student.py",
        STAGE,
        (
            "a draft has all layers",
            "    keep_first_layers(model, layers)\n",
            "",
            "test_a_draft_is_a_policy_of_its_own_that_others_start_from",
        ),
        (
            "a draft is made without the cache of its keys and values",
            "    model.config.use_cache = True  # it is off during training, but generation needs it\n",
            "",
            "test_a_draft_is_a_policy_of_its_own_that_others_start_from[lora]",
        ),
    ),
    *in_file(
        "stages/distil/student.py",
        DRAFTS,
        (
            "a student may have another tokenizer",
            "if tokenizer_hashes(own) != tokenizer_hashes(tokenizer):",
            "if False:",
            "test_a_student_with_another_tokenizer_or_template_is_refused",
        ),
        (
            "a draft may have as many layers as its policy",
            "    refuse(list(too_many_layers(config, available, where)))\n",
            "",
            "test_as_many_layers_as_the_model_has_are_refused",
        ),
    ),
    *in_file(
        "stages/distil/assisted.py",
        DRAFTS,
        (
            "greedy speed-ups follow from sampling",
            "_expected(figures.same_top,",
            "_expected(figures.acceptance,",
            _EXPECTED,
        ),
        (
            "sampling speed-ups follow from greedy",
            "_expected(figures.acceptance,",
            "_expected(figures.same_top,",
            _EXPECTED,
        ),
        (
            "a draft costs nothing",
            "expected_speed_up(rate, gamma, cost_ratio)",
            "expected_speed_up(rate, gamma, 0.0)",
            _EXPECTED,
        ),
        (
            "other answers are never an error",
            "max(gaps, default=0.0) > TIE",
            "False",
            "test_in_float32_other_answers_with_a_draft_are_an_error",
        ),
        (
            "the number of drafted tokens is the library's",
            "model.generation_config.num_assistant_tokens = gamma",
            "model.generation_config.num_assistant_tokens = 5",
            "test_a_draft_drafts_gamma_tokens_in_every_step",
        ),
        (
            "a gap is that of the last token that differs",
            "first = differing[0]",
            "first = differing[-1]",
            "test_the_gap_of_a_difference_is_that_of_the_targets_logits_at_the_first_one",
        ),
    ),
    *in_file(
        "algos/speculation.py",
        "unit/algos/test_speculation.py",
        (
            "the target adds no token of its own",
            "for power in range(gamma + 1)",
            "for power in range(gamma)",
            "test_expected_tokens_and_speed_up_are_those_of_the_paper",
        ),
        (
            "verifying takes no time",
            "(gamma * cost_ratio + 1.0)",
            "(gamma * cost_ratio + 0.0)",
            "test_expected_tokens_and_speed_up_are_those_of_the_paper",
        ),
    ),
    *in_file(
        "stages/distil/kind.py",
        "unit/pipeline/test_distil.py",
        (
            "a plan accepts a draft of all layers",
            "config.layers >= layers:",
            "config.layers > layers:",
            "test_what_cannot_be_right_is_refused_with_a_remedy",
        ),
        (
            "a draft is as deep as its policy to a plan",
            "layers if config.layers is None else config.layers",
            "layers",
            "test_what_cannot_be_right_is_refused_with_a_remedy",
        ),
    ),
]
