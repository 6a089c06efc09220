"""Before anything is timed: which rows each repetition takes, as text for our stage and as token ids for the others.

``python -m benchmarks.prepare TASK.json`` writes ``inputs.json`` and the files that it names into the task's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from alignment import worker
from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import DESIRABLE, UNDESIRABLE
from alignment.data.tokens.tokenize import answer_ids, encode, prompt_ids, tokenize_conversation
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.job import StageInput
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import lineage, load_scalar
from alignment.stages.kto.run import in_order
from alignment.stages.ppo.experience import prompt_order
from alignment.stages.registry import read_spec
from alignment.training.context import StageContext
from benchmarks import rows
from benchmarks.counts import counts_of
from benchmarks.figures import UPDATES
from benchmarks.growth import MODEL_SIZES, POINTS
from benchmarks.setting import GRPO_GROUP, MAX_LENGTH, MAX_PROMPT_LENGTH, PROMPTS, ROWS, SEED, read_json
from benchmarks.stage import artifact_of, stage_config, write_stage
from benchmarks.work import SamplingSize

Tokens = dict[str, list[int]]


def main(task_file: Path) -> None:
    """Writes what the contestants read."""
    task = read_json(task_file)
    folder, base = Path(task["folder"]), Path(task["base"])
    data = None if task["data"] is None else Path(task["data"])
    tokenizer = load_tokenizer(base)
    inputs: dict[str, Any] = {"models": {"base": parameters(base)}}
    if task["kind"] == "growth":
        inputs["repetitions"] = _growth(folder, tokenizer, data, task["repetitions"])
        inputs["models"] |= {name: parameters(_random_model(folder, base, name)) for name in MODEL_SIZES}
    else:
        inputs |= _select(
            task["kind"],
            folder,
            tokenizer,
            data,
            task["repetitions"],
            SamplingSize(**task["size"]),
            adapter=task["adapter"],
            batches=task["batches"],
        )
    if task["kind"] == "reward":
        inputs["head"] = str(_scorer_head(folder, base, Path(inputs["repetitions"][0]["rows"])))
    if task["kind"] == "ppo":
        inputs |= _reward_model(folder, base, tokenizer, data, task["adapter"])
    (folder / "inputs.json").write_text(json.dumps(inputs, indent=1), encoding="utf-8")


def parameters(folder: Path) -> dict[str, int]:
    """``linear`` counts N, the weights of linear layers below the head; ``head`` counts E."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return {"linear": sum(module.weight.numel() for module in linear), "head": head.weight.numel()}


# ---- rows --------------------------------------------------------------------------------------------------------


def _select(
    kind: str,
    folder: Path,
    tokenizer: Any,
    data: Path | None,
    repetitions: int,
    size: SamplingSize,
    *,
    adapter: str = "none",
    batches: int = 1,
) -> dict[str, Any]:
    """The rows of each repetition, for ``batches`` steps, and the counts of each step."""
    fitting, left_out = _fitting(kind, tokenizer, data, size.prompt_tokens)
    if kind == "sampling" and size.system_tokens:
        system = {"role": "system", "content": system_text(tokenizer, rows.conversations(data), size.system_tokens)}
        led = [{"messages": [system, *row["messages"]]} for row, _ in fitting]
        fitting = [(row, _prompt(tokenizer, row)) for row in led]
    count = {"sampling": size.prompts, "ppo": PROMPTS, "grpo": PROMPTS // GRPO_GROUP}.get(kind, ROWS)
    chosen = []
    for repetition in range(repetitions):
        part = rows.taken(fitting, repetition, count * batches)
        tokens = [row_tokens for _, row_tokens in part]
        if kind != "sampling":
            tokens = in_our_order(kind, adapter, folder, tokens)
        files = _write(folder, f"repetition-{repetition}", [row for row, _ in part], tokens)
        steps = [counts_of(kind, tokens[first : first + count]) for first in range(0, len(tokens), count)]
        chosen.append({**files, "steps": steps})
    return {
        "repetitions": chosen,
        "rows_that_fit": len(fitting),
        "rows_left_out": left_out,
        "rows_repeat": len(fitting) < count * batches * repetitions,
    }


def system_text(tokenizer: Any, conversations: Sequence[dict[str, Any]], tokens: int) -> str:
    """The first ``tokens`` tokens of the answers, as the text of a system turn."""
    answers = " ".join(turn["content"] for row in conversations for turn in row["messages"] if turn["role"] != "user")
    return str(tokenizer.decode(encode(tokenizer, answers)[:tokens])).strip()


def _fitting(
    kind: str, tokenizer: Any, data: Path | None, prompt_tokens: int = MAX_PROMPT_LENGTH
) -> tuple[list[tuple[dict[str, Any], Any]], int]:
    """Rows with their tokens, and how many were left out: too long, or not a conversation that we take.

    ``prompt_tokens`` is the limit for rows that are prompts alone.
    """
    tokenize: Callable[[Any, dict[str, Any]], Any]
    if kind == "sft":
        candidates, tokenize, limit = rows.conversations(data), _conversation, MAX_LENGTH
    elif kind in ("reward", "dpo"):
        candidates, tokenize, limit = rows.pairs(data), _pair, MAX_LENGTH
    elif kind == "kto":
        candidates, tokenize, limit = rows.answers(data), _labelled, MAX_LENGTH
    else:
        candidates, tokenize, limit = rows.prompts(data), _prompt, prompt_tokens
    fitting = []
    for row in candidates:
        try:
            tokens = tokenize(tokenizer, row)
        except DataError:
            continue
        if _longest(tokens) <= limit:
            fitting.append((row, tokens))
    return fitting, len(candidates) - len(fitting)


def _longest(tokens: Any) -> int:
    if isinstance(tokens, list):
        return len(tokens)
    if "input_ids" in tokens:
        return len(tokens["input_ids"])
    return len(tokens["prompt"]) + max(len(ids) for name, ids in tokens.items() if name != "prompt")


def _messages(row: dict[str, Any]) -> list[Message]:
    return [Message(role=turn["role"], content=turn["content"]) for turn in row["messages"]]


def _conversation(tokenizer: Any, row: dict[str, Any]) -> Tokens:
    tokenized = tokenize_conversation(tokenizer, _messages(row))
    return {"input_ids": tokenized.input_ids, "labels": tokenized.labels}


def _pair(tokenizer: Any, row: dict[str, Any]) -> Tokens:
    messages = _messages(row)
    answers = {name: answer_ids(tokenizer, messages, row[name]) for name in ("chosen", "rejected")}
    return {"prompt": prompt_ids(tokenizer, messages), **answers}


def _labelled(tokenizer: Any, row: dict[str, Any]) -> Tokens:
    """As our stage reads it: the answer is in the column of its label."""
    messages = _messages(row)
    sides: Tokens = {DESIRABLE: [], UNDESIRABLE: []}
    sides[DESIRABLE if row["label"] else UNDESIRABLE] = answer_ids(tokenizer, messages, row["completion"])
    return {"prompt": prompt_ids(tokenizer, messages), **sides}


def in_our_order(kind: str, adapter: str, folder: Path, tokens: list[Any]) -> list[Any]:
    """Rows in the order in which our stage takes them, so that a step of everyone has the same rows.

    Labelled answers stand beside the answer by which our stage estimates the divergence.
    """
    config: Any = stage_config(kind, adapter, folder, steps=1, rows=ROWS)
    spec = read_spec(write_stage(folder / "order", config, base=folder, data=folder))
    context = StageContext(spec=spec, rank=0, world_size=1)
    if kind == "kto":
        rng, longest = context.generator("order"), config.max_length
        rows = Dataset.from_list(tokens)
        return list(in_order(rows, rng, batch_size=ROWS, max_length=longest, mismatch=True))
    order: Iterable[int]
    if kind in UPDATES:
        order = prompt_order(len(tokens), 0, len(tokens), lambda number: context.generator("prompts", number))
    else:  # the order of a trainer of transformers in its first epoch
        order = SeedableRandomSampler(range(len(tokens)), data_seed=context.seed("trainer") % 2**32)
    return [tokens[index] for index in order]


def _prompt(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    return prompt_ids(tokenizer, _messages(row))


def _write(folder: Path, name: str, chosen: list[dict[str, Any]], tokens: list[Any]) -> dict[str, str]:
    text, ids = folder / f"{name}.jsonl", folder / f"{name}.tokens.json"
    text.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    ids.write_text(json.dumps(tokens), encoding="utf-8")
    return {"rows": str(text), "tokens": str(ids)}


# ---- growth ------------------------------------------------------------------------------------------------------


def _growth(folder: Path, tokenizer: Any, data: Path | None, repetitions: int) -> list[dict[str, Any]]:
    words = [word for row in rows.conversations(data) for turn in row["messages"] for word in turn["content"].split()]
    chosen = []
    for repetition in range(repetitions):
        points = {}
        for name, point in POINTS.items():
            made = []
            for index in range(point.rows):
                start = (repetition * point.rows + index) * point.length % len(words)
                own = words[start:] + words[:start]
                asked = words[: point.length // 2] if point.one_question else own[: point.length // 16]
                made.append(row_of_length(tokenizer, asked, own[len(asked) :], point.length))
            tokens = [_conversation(tokenizer, row) for row in made]
            points[name] = {
                **_write(folder, f"{name}-{repetition}", made, tokens),
                "steps": [counts_of("sft", tokens)],
            }
        chosen.append(points)
    return chosen


def row_of_length(tokenizer: Any, asked: list[str], words: list[str], length: int) -> dict[str, Any]:
    """A conversation of exactly ``length`` tokens: ``asked`` is the question, ``words`` fill the answer."""

    def row(count: int, filling: int = 0) -> dict[str, Any]:
        answer = " ".join(words[:count] + ["the"] * filling)
        turns = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    def size(conversation: dict[str, Any]) -> int:
        return len(_conversation(tokenizer, conversation)["input_ids"])

    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(row(middle)) <= length else (low, middle - 1)
    filled = row(low, length - size(row(low)))
    if size(filled) != length:
        raise ValueError(f"a row of {size(filled)} tokens was made where {length} are wanted")
    return filled


def _random_model(folder: Path, base: Path, name: str) -> Path:
    target = folder / "models" / name
    tokenizer = load_tokenizer(base)
    like = AutoConfig.from_pretrained(str(base))
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        max_position_embeddings=like.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL_SIZES[name],
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    return target


# ---- reward models -----------------------------------------------------------------------------------------------


def _scorer_head(folder: Path, base: Path, data: Path) -> Path:
    """The head that our stage will draw, for the others to start from."""
    config = stage_config("reward", "lora", data, steps=1, rows=ROWS)
    spec = read_spec(write_stage(folder / "head", config, base=base, data=data))
    torch.manual_seed(StageContext(spec=spec, rank=0, world_size=1).seed("head") % 2**63)
    model = load_scalar(lineage(spec, spec.inputs["init"]), torch.bfloat16)
    path = folder / "head.safetensors"
    save_file({"weight": model.score.weight.detach().clone()}, path)
    return path


def _reward_model(folder: Path, base: Path, tokenizer: Any, data: Path | None, adapter: str) -> dict[str, str]:
    """One step of the real stage, as an artifact for ours and as a plain transformers folder for TRL."""
    fitting, _ = _fitting("reward", tokenizer, data)
    part = rows.taken(fitting, 0, ROWS)
    files = _write(folder, "reward", [row for row, _ in part], [tokens for _, tokens in part])
    source = Path(files["rows"])
    config = stage_config("reward", adapter, source, steps=1, rows=ROWS)
    stage = folder / "reward"
    stage_file = write_stage(stage, config, base=base, data=source)
    spec = read_spec(stage_file)
    artifact = artifact_of(stage)
    if not artifact.exists() and worker.main(stage_file) != 0:
        raise RuntimeError("the reward stage failed; what it said stands above")
    model = load_reward_model(spec, StageInput(ref="stage:reward", path=artifact), device=torch.device("cpu"))
    plain = model.merge_and_unload() if adapter == "lora" else model
    plain.save_pretrained(str(folder / "reward-plain"))
    return {"reward_artifact": str(artifact), "reward_folder": str(folder / "reward-plain")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
