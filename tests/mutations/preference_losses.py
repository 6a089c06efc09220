"""Faults of the losses of pairs: signs, masks, weights and what is compared with what."""

from __future__ import annotations

from tests.mutations.mutation import in_file

TESTS = "unit/stages/test_pair_losses.py"
PAPERS = "test_a_loss_is_that_of_its_paper_before_and_after_the_policy_moved[{}-False]"
DPO, CONSERVATIVE, CONSERVATIVE_NORM, ROBUST, MARGIN, SIMPO, ORPO, NLL, HINGE = map(
    PAPERS.format,
    ("sigmoid", "conservative", "conservative_norm", "robust", "margin", "simpo", "orpo", "sigmoid+nll", "hinge"),
)
APO = PAPERS.format("apo_zero")
NO_REFERENCE = "test_a_loss_without_a_reference_has_none_anywhere"
RANKED = "test_answers_are_ranked_by_what_the_loss_compares"
CHANGES = "test_changes_are_those_of_the_first_batch_under_the_policy_of_now"

MUTATIONS = [
    *in_file(
        "algos/preferences.py",
        TESTS,
        (
            "the share of flipped labels is that of right ones",
            "-(1.0 - flipped) * logsig",
            "-flipped * logsig",
            CONSERVATIVE,
        ),
        ("flipped labels are not turned", "flipped * logsigmoid(-gaps)", "flipped * logsigmoid(gaps)", CONSERVATIVE),
        ("flipped labels count as a gain", "logsigmoid(gaps) - flipped", "logsigmoid(gaps) + flipped", CONSERVATIVE),
        ("an offset is added", "gaps - offsets", "gaps + offsets", MARGIN),
        ("SimPO's margin is added", "- target_margin)", "+ target_margin)", SIMPO),
        ("SimPO ignores its margin", "- target_margin)", "- 0.0 * target_margin)", SIMPO),
        ("SimPO ignores beta", "beta * (mean_chosen", "1.0 * (mean_chosen", SIMPO),
        ("SimPO prefers the rejected answer", "(mean_chosen - mean_rejected)", "(mean_rejected - mean_chosen)", SIMPO),
        ("odds are probabilities", "return logprobs - torch.log", "return logprobs - 0.0 * torch.log", ORPO),
        ("odds are turned over", "return logprobs - torch.log", "return logprobs + torch.log", ORPO),
        (
            "the odds of the chosen answer are a constant",
            "log_odds(mean_chosen) -",
            "log_odds(mean_chosen.detach()) -",
            ORPO,
        ),
        (
            "ORPO prefers the rejected answer",
            "log_odds(mean_chosen) - log_odds(mean_rejected)",
            "log_odds(mean_rejected) - log_odds(mean_chosen)",
            ORPO,
        ),
    ),
    *in_file(
        "stages/dpo/pair_losses.py",
        TESTS,
        ("SimPO's chosen answer is a sum", "return self.chosen / self.chosen_tokens", "return self.chosen", SIMPO),
        (
            "rejected answers are divided by the tokens of chosen ones",
            "return self.rejected / self.rejected_tokens",
            "return self.rejected / self.chosen_tokens",
            SIMPO,
        ),
        ("the reference is ignored", "self.chosen - self.reference_chosen,", "self.chosen,", CONSERVATIVE),
        (
            "the rejected answer's reference is ignored",
            "self.rejected - self.reference_rejected",
            "self.rejected",
            CONSERVATIVE,
        ),
        ("means are sums", "        if by_token:\n", "        if False:\n", CONSERVATIVE_NORM),
        ("sums are means", "pairs.gaps(beta, by_token=False)", "pairs.gaps(beta, by_token=True)", MARGIN),
        ("gaps ignore beta", "return beta * (chosen - rejected)", "return chosen - rejected", CONSERVATIVE),
        ("a margin ignores its weight", "weight * pairs.margins", "pairs.margins", MARGIN),
        ("ORPO ignores its weight", "odds_weight * ratio", "ratio", ORPO),
        ("ORPO does not learn the chosen answer", "return nll_of_chosen(pairs) + odds", "return odds", ORPO),
        (
            "the likelihood of the chosen answer is lowered",
            "return -pairs.mean_chosen",
            "return pairs.mean_chosen",
            NLL,
        ),
        (
            "the likelihood of the rejected answer is raised",
            "return -pairs.mean_chosen",
            "return -pairs.mean_rejected",
            NLL,
        ),
        (
            "robust is made conservative too",
            "if config.label_smoothing and config.loss is not DpoLoss.robust:",
            "if config.label_smoothing:",
            ROBUST,
        ),
        ("SimPO ranks without beta", "config.beta * pairs.mean_chosen,", "pairs.mean_chosen,", RANKED),
        ("ORPO ranks by probability", "preferences.log_odds(pairs.mean_chosen),", "pairs.mean_chosen,", RANKED),
    ),
    *in_file(
        "stages/dpo/pair_trainer.py",
        TESTS,
        (
            "margins stand beside other pairs",
            "example[MARGIN] for example in examples]",
            "example[MARGIN] for example in examples[::-1]]",
            MARGIN,
        ),
        ("the term of the chosen answer has no weight", "self.nll_weight * nll_of_chosen", "nll_of_chosen", NLL),
        (
            "the term of the chosen answer is not learned",
            "nll_of_chosen(pairs).mean()",
            "nll_of_chosen(pairs).mean().detach()",
            NLL,
        ),
        ("our loss is dropped", "if self.own_loss is not None:\n", "if False:\n", SIMPO),
        ("our loss is a sum", "self.own_loss(pairs).mean()", "self.own_loss(pairs).sum()", SIMPO),
        (
            "the answers of a pair are exchanged",
            "chosen, rejected = logprobs.chunk(2)",
            "rejected, chosen = logprobs.chunk(2)",
            SIMPO,
        ),
        (
            "answers have the tokens of their prompts",
            'inputs["completion_mask"].sum(-1).chunk(2)\n    return',
            'inputs["attention_mask"].sum(-1).chunk(2)\n    return',
            SIMPO,
        ),
        ("a loss without a reference computes one", "        if self.needs_reference:\n", "        if True:\n", SIMPO),
        (
            "a reference computed beforehand is not used",
            'if "ref_chosen_logps" in inputs:',
            "if False:",
            "test_a_precomputed_reference_is_read_and_not_computed",
        ),
        ("answers are ranked by sums", "if self.implicit_rewards is not None:", "if False:", RANKED),
        ("a tie counts as right", "(chosen > rejected).float()", "(chosen < rejected).float()", RANKED),
    ),
    *in_file(
        "stages/dpo/run.py",
        TESTS,
        (
            "DPO ignores beta",
            "beta=config.beta,",
            "beta=0.1,",
            DPO,
        ),
        ("DPO has one loss", "loss_type=config.loss.value if", 'loss_type="sigmoid" if', HINGE),
        (
            "robust ignores the share of flipped labels",
            "label_smoothing=config.label_smoothing if",
            "label_smoothing=0.1 if",
            ROBUST,
        ),
        (
            "DPO learns from pairs the other way round",
            '{column: f"{column}_ids" for column in pairs.column_names if column != MARGIN}',
            '{"prompt": "prompt_ids", "chosen": "rejected_ids", "rejected": "chosen_ids"}',
            DPO,
        ),
        (
            "a loss without a reference copies the model",
            "elif config.loss.needs_reference:",
            "else:",
            NO_REFERENCE,
        ),
        (
            "the loss at the start lacks the term of the chosen answer",
            "config.nll_weight * float(nll",
            "0.0 * float(nll",
            NLL,
        ),
        ("the loss of APO starts at ln 2", "(DpoLoss.hinge, DpoLoss.apo_zero,", "(DpoLoss.hinge,", APO),
    ),
    *in_file(
        "stages/shared/start_reference.py",
        TESTS,
        (
            "the reference follows the policy",
            "        with at_start(policy):\n",
            "        if policy is not None:\n",
            DPO,
        ),
        (
            "prompts are learned too",
            'on_host(batch["input_ids"], batch["completion_mask"])',
            'on_host(batch["input_ids"], batch["attention_mask"])',
            CHANGES,
        ),
        ("TRL's copy of the adapter stays", '    policy.delete_adapter("ref")\n', "    pass\n", NO_REFERENCE),
    ),
    *in_file(
        "stages/shared/start_check.py",
        TESTS,
    ),
    *in_file(
        "stages/dpo/first_batch.py",
        TESTS,
        ("a change is counted from zero", "(chosen - self.start.chosen).mean()", "chosen.mean()", CHANGES),
        ("a fall is a rise", "(rejected - self.start.rejected)", "(self.start.rejected - rejected)", CHANGES),
    ),
    *in_file(
        "stages/dpo/kind.py",
        "unit/stages/test_answer_changes.py",
        (
            "a fall of both answers is no doubt",
            "        doubts=_doubts,\n",
            "",
            "test_dpo_makes_both_answers_unlikely_and_says_so_and_nll_weight_makes_the_chosen_likely",
        ),
    ),
    *in_file(
        "stages/dpo/kind.py",
        "unit/pipeline/test_loss_settings.py",
        (
            "a fall of one answer is doubted",
            "if max(chosen, rejected) >= -HALVED:",
            "if min(chosen, rejected) >= -HALVED:",
            "test_a_fall_of_both_answers_is_doubted_once_they_are_half_as_likely",
        ),
    ),
    *in_file(
        "stages/reward/run.py",
        "unit/stages/test_reward.py",
        (
            "a reward model's margin has no weight",
            "[margin * difference for",
            "[difference for",
            "test_a_margin_is_subtracted_from_what_sigma_takes_on_learned_and_on_held_out_rows",
        ),
        (
            "held-out pairs have no margin",
            "rows=_dataset(pairs, config.margin), tokens",
            "rows=_dataset(pairs, 0.0), tokens",
            "test_a_margin_is_subtracted_from_what_sigma_takes_on_learned_and_on_held_out_rows",
        ),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_records.py",
        (
            "a margin is negative",
            "return chosen - rejected",
            "return rejected - chosen",
            "test_a_pair_holds_the_scores_of_its_row",
        ),
        (
            "scores may contradict a preference",
            "if chosen < rejected:",
            "if False:",
            "test_scores_that_contradict_a_preference_give_no_margin",
        ),
    ),
    *in_file(
        "data/tokens/chunks.py",
        "unit/data/test_token_table.py",
        (
            "all margins are those of the first pair",
            "number_of(tokenized_record.record)",
            "number_of(records[0])",
            "test_margins_stand_beside_their_pairs_and_a_pair_without_scores_is_left_out",
        ),
    ),
]
