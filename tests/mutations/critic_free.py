"""Faults of RL without a critic: advantages, averages, ratios, the KL and the entropy in the loss, and ties."""

from __future__ import annotations

from tests.mutations.mutation import in_file

STEP = "unit/training/test_critic_free_step.py"
PAPERS = "test_a_step_without_a_critic_is_what_the_papers_say"
EVERY = "test_with_ties_and_without_an_entropy_bonus_every_prompt_counts"
EMPTY = "test_minibatches_that_ties_leave_empty_are_passed_over"
OBJECTIVE, WEIGHT = "unit/training/test_policy_objective.py", "test_a_token_of_a_long_answer_weighs_less_in_grpo_alone"
HEAD = "unit/models/test_head.py"
ENTROPY = "test_an_entropy_has_the_gradient_of_the_whole_distributions_entropy"

MUTATIONS = [
    *in_file(
        "training/rl/policy_objective.py",
        STEP,
        ("both clips are the lower one", "clip_high=self.clip_high)", "clip_high=self.clip)", PAPERS),
        ("the KL in the loss is rewarded", "total + kl_coefficient * kl", "total - kl_coefficient * kl", PAPERS),
        ("the KL in the loss costs nothing", "total + kl_coefficient * kl", "total", PAPERS),
        (
            "the KL in the loss has no gradient",
            "total + kl_coefficient * kl",
            "total + kl_coefficient * kl.detach()",
            PAPERS,
        ),
        (
            "the KL in the loss is that of the reversed ratio",
            "k3(logprobs, sampled.reference_logprobs)",
            "k3(sampled.reference_logprobs, logprobs)",
            PAPERS,
        ),
        (
            "the KL in the loss is to the old policy",
            "k3(logprobs, sampled.reference_logprobs)",
            "k3(logprobs, sampled.logprobs)",
            PAPERS,
        ),
        (
            "the KL in the loss is averaged over all tokens alike",
            "sampled.reference_logprobs) * self._weights(mask))",
            "sampled.reference_logprobs) * mask)",
            PAPERS,
        ),
        ("entropy is punished", "total - self.entropy_coefficient *", "total + self.entropy_coefficient *", PAPERS),
        ("entropy earns nothing", "if self.entropy_coefficient:", "if False:", PAPERS),
        (
            "entropy is divided as the policy's terms are",
            "(entropy * mask).sum() / tokens",
            "(entropy * mask).sum() / divisor",
            PAPERS,
        ),
        ("an answer's ratio is that of its tokens", "if self.whole_answers:", "if False:", PAPERS),
        (
            "Dr. GRPO divides by the answers alone",
            "answers * self.max_new_tokens if",
            "answers if",
            PAPERS,
        ),
    ),
    *in_file(
        "training/rl/policy_objective.py",
        OBJECTIVE,
        ("GRPO has no length bias", "if self.average is Average.token_means:", "if False:", WEIGHT),
        (
            "Dr. GRPO has the length bias of GRPO",
            "if self.average is Average.token_means:",
            "if self.average in (Average.token_means, Average.constant_length):",
            WEIGHT,
        ),
    ),
    *in_file(
        "training/rl/advantages.py",
        STEP,
        (
            "the KL in an answer's reward is paid out",
            "scores - kl_coefficient * (kl",
            "scores + kl_coefficient * (kl",
            PAPERS,
        ),
        ("an answer's reward has no KL", "scores - kl_coefficient * (kl * response_mask).sum(-1)", "scores", PAPERS),
    ),
    *in_file(
        "stages/ppo/methods.py",
        STEP,
        ("RLOO does not leave one out", "Advantage.rloo: leave_one_out", "Advantage.rloo: group_centered", PAPERS),
        ("Dr. GRPO standardises", "Advantage.dr_grpo: group_centered", "Advantage.dr_grpo: group_standardized", PAPERS),
        ("RLOO has token ratios", "whole_answers=config.advantage is Advantage.rloo", "whole_answers=False", PAPERS),
        ("the KL is never in the loss", "kl_in_loss=config.kl.apply_to is KlTerm.loss", "kl_in_loss=False", PAPERS),
        (
            "the upper clip is the lower one",
            "config.clip if config.clip_high is None else config.clip_high",
            "config.clip",
            PAPERS,
        ),
        ("the entropy's coefficient never arrives", "=config.entropy_coefficient", "=0.0", PAPERS),
    ),
    *in_file(
        "stages/ppo/trainer.py",
        STEP,
        (
            "the KL is paid twice",
            "kl_coefficient=0.0 if self._objective.kl_in_loss else coefficient",
            "kl_coefficient=coefficient",
            PAPERS,
        ),
    ),
    *in_file(
        "stages/ppo/learn.py",
        STEP,
        (
            "the entropy bonus has no gradient",
            "entropy_gradient=objective.entropy_coefficient > 0.0",
            "entropy_gradient=False",
            PAPERS,
        ),
    ),
    *in_file(
        "models/forward/head.py",
        HEAD,
        ("an entropy's gradient has the wrong sign", "slopes.sub_(bend", "slopes.add_(bend", ENTROPY),
        (
            "an entropy's gradient lacks the entropy",
            "logits.add_(entropy[rows, None]).mul_(shares)",
            "logits.mul_(shares)",
            ENTROPY,
        ),
        (
            "an entropy's gradient is that at temperature 1",
            "(grad_entropy / ctx.temperature)",
            "(grad_entropy * 1.0)",
            ENTROPY,
        ),
    ),
]
