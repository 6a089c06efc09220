"""Tensors, generators and models on the wrong device, in many files, and needless waits: a simulated device notices."""

from __future__ import annotations

from tests.mutations.mutation import Mutation, in_file

_STAGES = "tests/simulated_device/test_stages.py::test_a_stage_runs_on_the_device"
_DECODING = "tests/simulated_device/test_waits.py::test_decoding_waits_once_for_a_token"
_BUDGET = "tests/simulated_device/test_waits.py::test_a_step_waits_no_more_often_than_its_budget_allows"


def _on_the_wrong_device(name: str, file: str, old: str, new: str, cell: str, *, test: str = _STAGES) -> Mutation:
    return Mutation(name=name, file=f"alignment/{file}", old=old, new=new, test=f"{test}[{cell}]")


MUTATIONS = [
    _on_the_wrong_device(
        "a stream's index stays on the host",
        "models/forward/rows.py",
        "        index=on_device(index, device),",
        "        index=index,",
        "sft-lora",
    ),
    _on_the_wrong_device(
        "the offsets of rows stay on the host",
        "models/forward/attention.py",
        "return on_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)",
        "return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)",
        "sft-lora",
    ),
    _on_the_wrong_device(
        "memory for logits is the host's",
        "models/forward/head_chunks.py",
        "self.logits = torch.empty(self.at_once, vocabulary, dtype=torch.float32, device=hidden.device)",
        "self.logits = torch.empty(self.at_once, vocabulary, dtype=torch.float32)",
        "sft-lora",
    ),
    _on_the_wrong_device(
        "the plan of batched attention stays on the host",
        "models/kernels/row_attention.py",
        "return {name: on_device(lines, self._device) for name, lines in joined.items()}",
        "return dict(joined)",
        "sft-lora-float32",
    ),
    _on_the_wrong_device(
        "the scales of four-bit weights stay on the host",
        "models/kernels/nf4.py",
        "setattr(self, name, buffer.to(getattr(self, name).device))",
        "setattr(self, name, buffer.cpu())",
        "sft-qlora",
    ),
    _on_the_wrong_device(
        "the cache of a decoding batch is the host's",
        "models/kernels/kv_cache.py",
        "states.new_zeros(rows, states.shape[1], length + self.room, states.shape[3])",
        "torch.zeros(rows, states.shape[1], length + self.room, states.shape[3], dtype=states.dtype)",
        "sample-lora",
    ),
    _on_the_wrong_device(
        "the random numbers of sampling stay on the host",
        "models/forward/generate.py",
        "uniforms = on_device(uniforms, model.device)",
        "uniforms = uniforms.cpu()",
        "sample-lora",
    ),
    _on_the_wrong_device(
        "the labels of answers stay on the host",
        "models/forward/answers.py",
        "labels=on_device(torch.tensor([token for answer in answers for token in answer]), device),",
        "labels=torch.tensor([token for answer in answers for token in answer]),",
        "ppo-lora",
    ),
    _on_the_wrong_device(
        "the tokens of pairs are counted on two devices",
        "training/micro_batches.py",
        "tokens -= shared_tokens(ids, mask)",
        'tokens -= shared_tokens(ids, mask).to(inputs["input_ids"])',
        "dpo-lora",
    ),
    _on_the_wrong_device(
        "rounding draws from a generator of the host",
        "training/adamw.py",
        "return torch.Generator(device).manual_seed",
        "return torch.Generator().manual_seed",
        "sft-bare",
    ),
    _on_the_wrong_device(
        "the value model stays on the host",
        "models/assembly/roles.py",
        "value = _value_model(spec, start, reward, adapter, device=device).to(device)",
        "value = _value_model(spec, start, reward, adapter, device=device).cpu()",
        "ppo-lora",
    ),
    _on_the_wrong_device(
        "the compared student stays on the host",
        "stages/distil/student_comparison.py",
        "load_policy(policy, DTYPES[context.spec.model.dtype]).to(context.device).requires_grad_(False)",
        "load_policy(policy, DTYPES[context.spec.model.dtype]).requires_grad_(False)",
        "distil_tokens-lora",
    ),
    _on_the_wrong_device(
        "an evaluated policy stays on the host",
        "stages/shared/arm_policies.py",
        "DTYPES[self._context.spec.model.dtype]).to(self._context.device)",
        "DTYPES[self._context.spec.model.dtype])",
        "evaluate",
        test=_DECODING,
    ),
    _on_the_wrong_device(
        "a step reads its loss once more",
        "training/micro_batches.py",
        "self.step_loss = total",
        "self.step_loss = total + 0.0 * total.item()",
        "sft",
        test=_BUDGET,
    ),
    _on_the_wrong_device(
        "a list of rows is copied for each column",
        "stages/ppo/learn.py",
        "return on_device(torch.tensor(rows), self._context.device)",
        "return torch.tensor(rows)",
        "ppo",
        test=_BUDGET,
    ),
    _on_the_wrong_device(
        "metrics are read in every micro-batch",
        "training/rl/step_metrics.py",
        "self._unread.append((name, value, True))",
        "self._unread.append((name, torch.tensor(value.item()).to(value), True))",
        "ppo",
        test=_BUDGET,
    ),
    Mutation(
        name="every layer copies the prefix of the reference",
        file="alignment/models/assembly/prefix.py",
        old="states = self._start = self._start.to(device)",
        new="states = self._start.to(device)",
        test="tests/simulated_device/test_waits.py::test_a_prefix_costs_no_wait",
    ),
    *in_file(
        "training/rl/step_metrics.py",
        "unit/training/test_metrics.py",
        (
            "maxima add up",
            "if is_maximum:",
            "if False:",
            "test_shares_and_maxima_of_all_micro_batches_are_read_together",
        ),
    ),
    *in_file(
        "training/rl/experience.py",
        "unit/training/test_experience.py",
        (
            "values move on by a token",
            "cumsum(0) - 1)",
            "cumsum(0) - 2)",
            "test_a_stream_is_spread_over_rows_and_is_zero_beside_them",
        ),
        (
            "values stand beside answers",
            "torch.where(mask, flat[index], 0.0)",
            "flat[index]",
            "test_a_stream_is_spread_over_rows_and_is_zero_beside_them",
        ),
    ),
    *in_file(
        "training/rl/rollouts.py",
        "unit/training/test_ppo_step.py",
        (
            "the reference is the policy",
            "reference_logprobs=by_answer[1]",
            "reference_logprobs=by_answer[0]",
            "test_a_step_is_what_the_papers_say",
        ),
        ("values are entropies", "by_answer[3]", "by_answer[2]", "test_a_step_is_what_the_papers_say"),
    ),
    *in_file(
        "models/forward/causal.py",
        "unit/models/test_forward.py",
        (
            "padding may have a label",
            "if bool((has_label & ~is_real).any()):",
            "if bool((has_label & is_real & ~is_real).any()):",
            "test_labels_on_padding_are_refused",
        ),
    ),
]
