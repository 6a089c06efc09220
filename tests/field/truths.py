"""What must be true of any run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.job import StageInput
from alignment.models.assembly.load import lineage, load_policy
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.generate import generate
from alignment.records.cost import FILE as COST
from alignment.records.cost import RunCost
from alignment.stages.registry import read_spec
from tests.field.draws import WITH_EXPERTS, Draw
from tests.field.runs import Broken, Field, Refused, Run

NOISE = {"float32": 5e-3, "bfloat16": 0.25}
"""How far a gradient's norm may depend on micro-batches and processes, relative to it: on so small models, a few
tokens in bfloat16 move it by some percent."""
ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
"""How far logits of exported weights may be from those of the policy in float32, relative to the largest."""
LEAST_MEMORY, MOST_MEMORY = 0.5, 1.25
"""Of what is planned. Plans of tiny models are too high: .69 was measured of PPO on two processes."""


def check(field: Field, draw: Draw) -> None:
    """Runs the draw, and holds it to everything. Raises Refused: the draw cannot be run, and the error says what to
    change; Broken: something is not true."""
    run = field.run(draw)
    _starts_at_the_reference(run)
    _weights_are_finite_and_changed(run)
    field.status(run)
    if draw.evaluated and draw.last != "reward" and not (run.folder / "runs/field/report.html").exists():
        raise Broken("there is no report")
    _memory_is_as_planned(run)
    if draw.killed is not None and draw.killed < _checkpoints(run):
        again = _again(field, run, "killed", killed=draw.killed)
        _must(again.weights(draw.last) == run.weights(draw.last), "a killed stage ended with other weights")
        _must(_untimed(again) == _untimed(run), "a killed stage logged other metrics")
    if draw.tokens is not None:
        _first_gradients_agree(run, _again(field, run, "cut otherwise", micro_batch_tokens=draw.tokens))
    if draw.processes > 1 and _has_same_batch_alone(run):
        _first_gradients_agree(run, _again(field, run, "alone", processes=1))
    _plain_libraries_read_it(run)
    if draw.export is not None:
        _export_is_the_policy(field, run)


def _again(field: Field, run: Run, name: str, *, processes: int | None = None, **changes: Any) -> Run:
    """From the same earlier stages. What ran once is not refused."""
    draw = replace(run.draw, processes=processes or run.draw.processes, costs=False)
    try:
        return field.run(draw, name, like=run, **changes)
    except Refused as refusal:
        raise Broken(f"a run was refused that had ended before: {refusal}") from refusal


def _has_same_batch_alone(run: Run) -> bool:
    """Whether one process would learn from the same rows: of a batch that is not whole, several repeat some, and they
    sample in other batches, which in bfloat16 gives other answers. One row alone may be worse by a divergence."""
    settings = run.draw.stages[run.draw.last]
    if run.draw.last == "ppo":
        return run.draw.dtype == "float32" and settings["ppo_epochs"] == 1
    rows = json.loads((run.artifact(run.draw.last) / "manifest.json").read_text())["metrics"]["rows"]
    whole_batches = rows // settings["optim"]["batch_size"]
    return not settings.get("packing", run.draw.last == "cpt") and settings["optim"]["max_steps"] <= whole_batches


def _memory_is_as_planned(run: Run) -> None:
    """Where ``--cost`` speaks of a stage."""
    for stage in run.draw.stages if run.draw.costs else ():
        cost = RunCost.read(run.folder / "runs/field" / stage / COST).stages[0]
        usage = json.loads((run.artifact(stage) / "manifest.json").read_text())["usage"]
        if not cost.error:
            measured = usage["peak_rss_bytes"] / cost.peak
            _must(LEAST_MEMORY < measured < MOST_MEMORY, f"{stage} takes {measured:.2f} times the planned memory")


def _untimed(run: Run) -> list[dict[str, Any]]:
    """The last stage's metrics, without those of clocks and of memory."""
    measured = ("seconds", "time/", "memory/")
    return [{key: line[key] for key in line if not key.startswith(measured)} for line in run.lines(run.draw.last)]


def _checkpoints(run: Run) -> int:
    """How many checkpoints the last stage wrote: one a step, or one an update."""
    return len(run.lines(run.draw.last))


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def _starts_at_the_reference(run: Run) -> None:
    """Before the first step, policy and reference are one policy, and the old policy is the new one."""
    draw, settings = run.draw, run.draw.stages[run.draw.last]
    first = run.lines(draw.last)[0]
    if draw.last == "ppo":
        if first.get("policy/steps", 0.0):  # none if all answers tie
            _must(first["policy/approxkl_first"] < 1e-6, f"first ratios are not 1: {first}")
        _must(abs(first["objective/kl"]) < 1e-2, f"the first KL is {first['objective/kl']}")
    if draw.last in ("dpo", "kto") and settings.get("loss") not in ("simpo", "orpo"):
        precomputed = settings.get("precompute_reference", False) and draw.dtype == "bfloat16"
        names = [name for name in ("rewards/chosen", "rewards/rejected") if name in first]
        far = {name: first[name] for name in names if abs(first[name]) > (0.3 if precomputed else 1e-3)}
        _must(not far, f"policy and reference differ at the start: {far}")


def _weights_are_finite_and_changed(run: Run) -> None:
    """Trained ones have changed, if the log has gradients; those of the base have not."""
    for stage in run.draw.stages:
        weights = [(name, load(content)) for name, content in run.weights(stage).items()]
        _must(bool(weights), f"{stage} left no weights")
        for name, tensors in weights:
            bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
            _must(not bad, f"{stage}: {name} has {bad[:3]} with NaN or infinite numbers")
        moved = _has_moved(run, stage)
        norms = [line.get("grad_norm", 0.0) for line in run.lines(stage)]
        _must(all(math.isfinite(norm) for norm in norms), f"{stage} has gradients {norms}")
        learns = [line.get("objective/score_std", 1.0) > 0 for line in run.lines(stage)]  # or the critic alone learns
        if any(norm > 1e-3 and learned for norm, learned in zip(norms, learns, strict=True)):
            _must(moved, f"{stage} had gradients {norms} and changed no weights")


def _has_moved(run: Run, stage: str) -> bool:
    """Whether the stage changed what it trained: an adapter that begins at zero or continues, or the whole model."""
    if adapters := _adapters(run, stage):
        content, stages = adapters[-1].read_bytes(), list(run.draw.stages)
        earlier = [file for name in stages[: stages.index(stage)] for file in _adapters(run, name)]
        if content in [file.read_bytes() for file in earlier]:
            return False
        return any(bool(tensor.any()) for key, tensor in load(content).items() if "lora_B" in key)
    start = load((run.folder / "model/model.safetensors").read_bytes())
    trained = load((run.artifact(stage) / "model/model.safetensors").read_bytes())
    return any(not torch.equal(trained[name], start[name].to(trained[name].dtype)) for name in start if name in trained)


def _adapters(run: Run, stage: str) -> list[Path]:
    return sorted((run.artifact(stage) / "adapters").glob("*/adapter_model.safetensors"))


def _first_gradients_agree(run: Run, other: Run) -> None:
    first, second = (each.lines(run.draw.last)[0] for each in (run, other))
    if run.draw.last == "ppo" and run.draw.stages["ppo"]["num_minibatches"] > 1:
        return  # the line has the norm of the last minibatch
    norms = first["grad_norm"], second["grad_norm"]
    bound = NOISE[run.draw.dtype] * max(*norms, 0.05)
    _must(abs(norms[0] - norms[1]) <= bound, f"{other.folder.name}, the first gradient differs: {norms}")


def _plain_libraries_read_it(run: Run) -> None:
    """transformers and PEFT alone answer as this package does."""
    draw = run.draw
    kinds = {settings["adapter"]["kind"] for settings in draw.stages.values()}
    if draw.last == "reward" or kinds & {"qlora", "prefix"} or draw.architecture in WITH_EXPERTS:
        return  # a reward model has no answers, and plain PEFT does not round a base to four bits
    spec = read_spec(run.folder / "runs/field" / draw.last / "stage.yaml")
    line = lineage(spec, StageInput(ref=f"stage:{draw.last}", path=run.artifact(draw.last)))
    ours, plain = load_policy(line, torch.float32).eval(), plain_policy(run.artifact(draw.last))
    prompts = [[5, 9, 11, 40], [17, 3, 8, 30, 31, 32, 33]]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = plain(ids).logits
            gap = float((ours(ids).logits - logits).abs().max() / logits.abs().max())
            read = answer_statistics(ours, answer_stream([prompt[:1]], [prompt[1:]], ids.device)).logprobs
            expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            away = float((read - expected).abs().max() / expected.abs().max())
        _must(gap < 2e-2, f"plain transformers and PEFT read another policy, {gap:.3g} apart")
        _must(away < 2e-2, f"log-probabilities are not those of the logits, {away:.3g} apart: a shifted mask?")
    answers = generate(ours, prompts, max_new_tokens=6, end_ids=[2], batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])  # with a mask, because transformers would hide what looks like padding
        greedy = ours.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=2
        )
        expected = greedy[0, len(prompt) :].tolist()
        end = expected.index(2) + 1 if 2 in expected else len(expected)
        _must(answer == expected[:end], f"greedy answers differ: {answer} and {expected}")


def _export_is_the_policy(field: Field, run: Run) -> None:
    """A GGUF file is compared by the command itself; plain PEFT reads no four-bit base as it was trained."""
    try:
        folder = field.export(run)
    except Refused:
        return
    of_scores, kinds = run.draw.last == "reward", {stage["adapter"]["kind"] for stage in run.draw.stages.values()}
    if run.draw.export != "model":
        return
    auto = AutoModelForSequenceClassification if of_scores else AutoModelForCausalLM
    ids = torch.tensor([[5, 9, 11, 40, 17, 3]])
    with torch.no_grad():
        logits = auto.from_pretrained(str(folder), dtype=torch.float32).eval()(ids).logits
        _must(bool(logits.isfinite().all()), "the exported model gives NaN or infinite logits")
        if of_scores or "qlora" in kinds or run.draw.architecture in WITH_EXPERTS:
            return
        policy = plain_policy(run.artifact(run.draw.last))(ids).logits
    gap = float((policy - logits).abs().max() / policy.abs().max())
    _must(gap < ROUNDING[run.draw.dtype], f"the exported model is another policy, {gap:.3g} apart")


def plain_policy(artifact: Path) -> Any:
    """A result as plain libraries load it, in float32."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    whole = artifact / "model"
    base = whole if whole.exists() else Path(manifest["base"]["path"])
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in manifest["adapters"]:
        model = PeftModel.from_pretrained(model, str(artifact / adapter)).merge_and_unload()
    return model.eval()
