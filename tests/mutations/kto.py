"""What the KTO stage hands to TRL's trainer, and how the divergence of the whole batch gets into it."""

from __future__ import annotations

from tests.mutations.mutation import in_file

_PAPER = "test_the_loss_and_its_gradient_are_those_of_the_paper"
_START = "test_the_first_loss_is_half_the_mean_weight"
_RESULT = "test_the_result_records_the_labels_and_the_weights_that_follow_from_them"
_MISMATCHED = "test_each_prompt_gets_the_answer_of_another_row_of_its_batch"

MUTATIONS = [
    *in_file(
        "stages/kto/kto_trainer.py",
        "unit/stages/test_kto.py",
        (
            "KTO's divergence is that of the matched answers",
            "return {name: batch[OTHER + name] for name in TEXT}",
            "return {name: batch[name] for name in TEXT}",
            _PAPER,
        ),
        (
            "KTO's divergence is that of one micro-batch",
            "self._divergence.expand(len(batch[LABEL]))",
            "self._divergence.expand(len(batch[LABEL])) * self._share",
            _PAPER,
        ),
        (
            "KTO's reference is the policy",
            "answer_logprobs(self.ref_model, rows)",
            "answer_logprobs(self.model, rows)",
            _PAPER,
        ),
        (
            "KTO's rewards are averaged by rows of both labels",
            'name.rpartition("/")[2], shares)',
            '"", shares)',
            _PAPER,
        ),
        (
            "KTO's margin is that of some micro-batches",
            "[rewards[0][0] - rewards[1][0]]",
            "metrics[MARGINS][before[MARGINS] :]",
            _PAPER,
        ),
    ),
    *in_file(
        "stages/kto/run.py",
        "unit/stages/test_kto.py",
        ("KTO ignores beta", "beta=config.beta,", "beta=0.1,", _PAPER),
        (
            "KTO has one loss",
            "loss_type=config.loss.value",
            'loss_type="kto"',
            "test_the_first_losses_are_those_of_trl_s_own_trainer",
        ),
        (
            "KTO's desirable weight is ignored",
            "desirable_weight=weights.desirable,\n            un",
            "desirable_weight=1.0,\n            un",
            _PAPER,
        ),
        (
            "KTO's weights change places",
            "undesirable_weight=weights.undesirable,\n            max_length",
            "undesirable_weight=weights.desirable,\n            max_length",
            _PAPER,
        ),
        (
            "a precomputed reference is that of the mismatched answers",
            "{ANSWER: REFERENCE, MISMATCHED: OTHER_REFERENCE}",
            "{MISMATCHED: REFERENCE, ANSWER: OTHER_REFERENCE}",
            "test_the_loss_and_its_gradient_are_those_of_the_paper_with_a_precomputed_reference",
        ),
    ),
    *in_file(
        "stages/kto/run.py",
        "unit/training/test_row_lengths.py",
        (
            "mismatched answers may go beyond the positions",
            "min(config.max_length, positions_of(unwrapped(policy).base_model))",
            "config.max_length",
            "test_mismatched_answers_are_cut_to_the_positions_where_these_are_fewer",
        ),
    ),
    *in_file(
        "stages/kto/labelled_rows.py",
        "unit/stages/test_kto.py",
        (
            "desirable answers count as undesirable",
            "        LABEL: label,\n",
            "        LABEL: pc.invert(label),\n",
            "test_rows_of_one_prompt_meet_answers_to_another",
        ),
        ("a prompt gets its own answer", "(row - distance) % len(batch)", "row", _MISMATCHED),
        (
            "mismatched answers are never cut",
            "if (lengths <= room).all():",
            "if True:",
            "test_a_mismatched_answer_is_cut_to_the_longest_row_that_the_stage_allows",
        ),
        (
            "the distance between answers is always one",
            "        if own < fewest:\n",
            "        if distance == 1:\n",
            _MISMATCHED,
        ),
        ("a last row meets itself", "        others[-1] -= 1\n", "        others[-1] -= 0\n", _MISMATCHED),
        (
            "rows are not shuffled",
            "torch.randperm(len(rows), generator=rng).numpy()",
            "torch.arange(len(rows)).numpy()",
            "test_rows_of_one_prompt_meet_answers_to_another",
        ),
        (
            "desirable rows are counted as undesirable",
            "{DESIRABLE: desirable, UNDESIRABLE: len(rows) - desirable}",
            "{UNDESIRABLE: desirable, DESIRABLE: len(rows) - desirable}",
            _RESULT,
        ),
    ),
    *in_file(
        "stages/kto/kind.py",
        "unit/stages/test_kto.py",
        (
            "rows of one label are learned from",
            "if not labels.get(label)), None)",
            "if labels.get(label) == -1), None)",
            "test_rows_of_one_label_are_refused",
        ),
    ),
    *in_file(
        "algos/label_weights.py",
        "unit/algos/test_label_weights.py",
        (
            "the weights of labels go the wrong way",
            "at_one.desirable / excess",
            "at_one.desirable * excess",
            "test_a_weight_that_is_null_brings_the_ratio_within_its_bounds",
        ),
        (
            "too many desirable answers are not made up for",
            "at_one.undesirable * excess",
            "at_one.undesirable",
            "test_a_weight_that_is_null_brings_the_ratio_within_its_bounds",
        ),
        (
            "the ratio of weights may be anything",
            "1.0, 4 / 3\n",
            "0.0, 1e9\n",
            "test_a_weight_that_is_null_brings_the_ratio_within_its_bounds",
        ),
    ),
    *in_file(
        "data/tokens/row_kinds.py",
        "unit/stages/test_kto.py",
        (
            "labels of answers change places in the rows",
            "DESIRABLE if record.desirable else UNDESIRABLE",
            "UNDESIRABLE if record.desirable else DESIRABLE",
            _RESULT,
        ),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_records.py",
        (
            "the worse answer of a pair is the desirable one",
            "[(better.text, True), (worse.text, False)]",
            "[(worse.text, True), (better.text, False)]",
            "test_a_labelled_answer_is_read_from_a_label_or_from_a_pair",
        ),
        (
            "a label is turned over",
            "return [(last.whole, example.good)]",
            "return [(last.whole, not example.good)]",
            "test_a_labelled_answer_is_read_from_a_label_or_from_a_pair",
        ),
    ),
]
