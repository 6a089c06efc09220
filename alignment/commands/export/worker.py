"""Exports a result for other programs; ``align export`` sends a request in JSON.

Adapters are merged into the weights that they were trained on, after dequantising weights in four bits. The difference
that rounding the sum makes is measured and limited. The written folder is then loaded by plain transformers or PEFT,
and must give the expected outputs before the export is complete.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignment.commands.export.export_options import GGUF, GGUF_TYPES, VLLM, ExportOptions
from alignment.commands.export.exported import (
    ExportedResult,
    exported_result,
    logprobs,
    logprobs_of_answers,
    merged_policy,
    refuse_differences,
    refuse_prefix,
    stream_logprobs,
)
from alignment.commands.export.gguf_form import gguf_file
from alignment.commands.export.gguf_form.gguf_file import vocabulary, write_file
from alignment.commands.export.gguf_form.llama_cpp_check import check_by_llama
from alignment.commands.export.gguf_form.modelfile import modelfile
from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance, value_without_folders
from alignment.commands.shared.loaded_policies import generation_settings
from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.config.launch import Engine, SamplingConfig
from alignment.config.model import Dtype
from alignment.core.artifacts import REWARD_MODEL, Manifest, readable, verify
from alignment.core.errors import DataError, ModelError
from alignment.core.files import explained, partial_folder
from alignment.data.tokens.tokenize import turn_end_id
from alignment.engines.completions import OTHER_WEIGHTS, Asked, EngineAnswer, Generation
from alignment.engines.engine_environment import interpreter
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import VllmOptions
from alignment.models.assembly.adapters import put_back
from alignment.models.assembly.heads import AT_TURN_END, HEAD
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, load_scalar, load_scalar_head
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.head import scales_logits

_AS_MODEL = "export it as a model"
_NO_REWARD_MODEL = {
    "adapter": "an adapter cannot hold the head of a reward model and its offset",
    GGUF: "a GGUF file has no field for the head of a reward model and its offset",
    VLLM: "vLLM generates answers, and a reward model gives none",
}


def write_adapter(result: ExportedResult, folder: Path) -> list[str]:
    """Copies the adapter's folder as PEFT wrote it; it must be the only difference between the base and the policy.
    ``generation_config.json`` is that of the policy, as in the other forms. Raises ModelError."""
    lineage = result.lineage
    if len(lineage.adapters) != 1 or lineage.source == "self":
        stack = " on ".join(adapter.path.name for adapter in reversed(lineage.adapters)) or "no adapter"
        message = f"it is not a single adapter on a public base, but {stack} on {lineage.source}"
        raise ModelError(message, remedy=_AS_MODEL)
    shutil.copytree(lineage.adapters[0].path, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"], config["revision"] = _base_for_peft(result)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    # PEFT does not read it; the card's lines do, because the base ends answers and samples in its own way.
    try:
        stops = result.stops
    except DataError:  # the template ends no turn where none was learned, as in continued pretraining
        stops = result.text_ends
    generation_settings(stops, result.tokenizer.pad_token_id).save_pretrained(str(folder))
    original = put_back(load_policy(lineage.weights, torch.float32), [lineage.adapters[0].path], trainable=False)
    policy = original.get_base_model()
    # The flat forward, which supports a prefix, leaves out what a model does to its logits.
    expected = logprobs(original, result.rows) if scales_logits(policy) else stream_logprobs(policy, result.rows)
    again = PeftModel.from_pretrained(load_policy(lineage.weights, torch.float32), str(folder)).eval()
    refuse_differences(logprobs(again, result.rows), expected, folder)
    notes = [
        "loaded by PEFT on its base, it gives the same outputs on the test texts as the policy of this run",
        f"whoever loads it needs the base: {lineage.base}",
    ]
    in_four_bits = "it was trained on a base in four bits (NF4, double quantisation), so load the base in the same way"
    return [*notes, in_four_bits] if lineage.adapters[0].nf4 else notes


def _base_for_peft(result: ExportedResult) -> tuple[str, str | None]:
    """The base's name on the hub and its commit, or its folder; the revision in the recipe may be a branch."""
    source, content = result.lineage.source, result.manifest.base["content"]
    if not source.startswith("hub:"):
        return str(result.lineage.base), None
    name, _, revision = str(content or source).removeprefix("hub:").partition("@")
    return name, revision or None


def write_policy(result: ExportedResult, folder: Path, *, max_gap: float) -> list[str]:
    """Writes a causal language model with the adapters merged; returns notes about it. Raises ModelError: see
    ``merged_policy``; or it gives other outputs when it is loaded."""
    dtype = DTYPES[result.dtype]
    merged, expected, notes = merged_policy(result, dtype, max_gap=max_gap)
    merged.config.use_cache = True
    # So that `generate` stops where it stopped here, and the base's own settings change no answer.
    merged.generation_config = generation_settings(result.stops, result.tokenizer.pad_token_id)
    merged.save_pretrained(str(folder))
    again = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    refuse_differences(logprobs(again, result.rows), expected, folder)
    return [*notes, "loaded by transformers, it gives the same outputs on the test texts as before it was saved"]


def write_reward(result: ExportedResult, folder: Path) -> list[str]:
    """Writes a sequence classifier, whose score lacks our offset, because it has no field for it. The file keeps the
    head in float32. A reader in bfloat16 rounds it, so the expected scores are rounded alike. Raises ModelError."""
    refuse_prefix(result.lineage)
    dtype = DTYPES[result.dtype]
    model = load_scalar(result.lineage, dtype)
    load_scalar_head(model, result.artifact / HEAD)
    padding = _set_padding(model, result)
    setattr(model.config, AT_TURN_END, True)
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    rows = [[*row, turn_end_id(result.tokenizer)] for row in result.rows]
    exact = _scores_at_ends(model, rows)
    model.score.to(dtype)
    expected = _scores_at_ends(model, rows)
    change = float((expected - exact).abs().max())
    rounded = (
        f"loaded in {result.dtype.value}, its head and scores are rounded, which changed scores by at most "
        f'{change:.2g} on the test texts; loaded with dtype="float32", they are not'
    )
    again = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    refuse_differences(_scores(again, rows), expected, folder)
    return [
        f"its scores are the scores in training plus {float(model.score_offset):.4f}, the offset that makes chosen "
        "answers score 0",
        *([] if result.dtype is Dtype.float32 else [rounded]),
        padding,
        "loaded by transformers, it gives the same scores at the end of the test texts as before it was saved",
    ]


def _set_padding(model: PreTrainedModel, result: ExportedResult) -> str:
    """Keeps the padding token, or chooses another if it ends turns; returns a note about it. transformers scores the
    last token that is not padding. In training, padding is often EOS, which often ends turns."""
    tokenizer, size = result.tokenizer, model.get_input_embeddings().num_embeddings
    turn_end, before = turn_end_id(tokenizer), tokenizer.pad_token
    control = [token for token, content in sorted(tokenizer.added_tokens_decoder.items()) if content.special]
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, *control]
    usable = [token for token in known if token is not None and token != turn_end and token < size]
    model.config.get_text_config().pad_token_id = usable[0] if usable else None
    if not usable:
        return "its only special token ends turns, so it cannot be padding: score one conversation at a time"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    if tokenizer.pad_token == before:
        return f"its padding token is {before}"
    return f"its padding token is {tokenizer.pad_token}, because {before} ends turns, and padding would hide their ends"


@torch.no_grad()
def _scores(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]``, where transformers finds the ends of the rows."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows]).float()


@torch.no_grad()
def _scores_at_ends(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]`` at the last token of each, as in training."""
    states = [model.base_model(torch.tensor([row])).last_hidden_state for row in rows]
    return torch.cat([model.score(of_row.to(model.score.weight.dtype))[0, -1] for of_row in states]).float()


TOKENS = 16
"""Tokens that are compared of each answer."""
_OF_FREE, _START_SECONDS = 0.9, 1800.0
"""Nothing else of the export is on the GPU, and a large model may be read from a slow disk. Chosen, not tuned."""


def write_for_vllm(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    """Writes a causal language model as ``--as model`` does, and has a vLLM server answer with it. Raises ConfigError,
    StageError, ModelError."""
    interpreter(options.engine_python, package="vllm", where="--engine-python")
    notes = write_policy(result, folder, max_gap=options.max_gap)
    generation = Generation(max_new_tokens=TOKENS, temperature=0.0, end_ids=result.stops)
    of_vllm = _vllm_answers(result, folder, generation, options)
    model = load_policy(Lineage(source="self", base=folder, adapters=()), DTYPES[result.dtype])
    under = logprobs_of_answers(model, result.rows, [answer.ids for answer in of_vllm])
    use_flat_attention(model)
    ours = generate(model, result.rows, max_new_tokens=TOKENS, end_ids=result.stops, batch_size=len(result.rows))
    differences = [
        abs(own - other)
        for own_row, answer in zip(under, of_vllm, strict=True)
        for own, other in zip(own_row, answer.logprobs, strict=True)
    ]
    gap = sum(differences) / len(differences)
    if gap > OTHER_WEIGHTS:
        message = f"vLLM's log-probabilities differ from ours by {gap:.2f} nats per token; nothing was exported"
        remedy = "this version of vLLM computes the model differently; use --as model or --as gguf"
        raise ModelError(message, where=str(folder), remedy=remedy)
    equal = sum(answer.ids == own for answer, own in zip(of_vllm, ours, strict=True))
    return [
        *notes,
        f"loaded by vLLM, {equal} of {len(ours)} greedy answers to the test texts begin with the same {TOKENS} tokens "
        f"as here, and its log-probabilities differ by {gap:.2g} nats per token on average",
    ]


def _gpu_share() -> float:
    """Most of what is free now; vLLM does not start if others have what it asks for. Without a GPU it has no effect."""
    if not torch.cuda.is_available():
        return SamplingConfig().gpu_share
    free, total = torch.cuda.mem_get_info()
    return _OF_FREE * free / total


def _vllm_answers(
    result: ExportedResult, folder: Path, generation: Generation, options: ExportOptions
) -> list[EngineAnswer]:
    config = SamplingConfig(
        engine=Engine.vllm, python=options.engine_python, gpu_share=_gpu_share(), start_timeout=_START_SECONDS
    )
    with EngineSession(config, where="--as vllm") as session:
        session.start(
            VllmOptions(
                model=folder,
                dtype=result.dtype.value,
                max_length=max(map(len, result.rows)) + generation.max_new_tokens,
                on_gpu=torch.cuda.is_available(),
            )
        )
        asked = [Asked(prompt=row, answers=1, seed=0) for row in result.rows]
        return [answers[0] for answers in session.answers(Weights(), asked, generation)]


def write_gguf(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    """Writes the file, and the Modelfile unless it is not wanted; returns notes about them. Adapters are merged in
    float32, so that a weight is rounded once, to the file's type. Raises ModelError."""
    dtype = options.dtype or GGUF_TYPES[0]
    file = folder / f"model-{dtype}.gguf"
    gguf_file.architecture_of(AutoConfig.from_pretrained(str(result.lineage.base)))  # refused before anything is merged
    merged, expected, notes = merged_policy(result, torch.float32, max_gap=options.max_gap)
    words = vocabulary(result.tokenizer, merged.config.vocab_size, result.stops)
    notes += words.notes
    folder.mkdir()
    if options.has_modelfile:
        text, about = modelfile(
            file.name,
            result.tokenizer,
            stops=words.stops,
            context=merged.config.max_position_embeddings,
            adds_bos=words.adds_bos,
        )
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        notes += about
    metadata = {
        **gguf_file.model_metadata(merged.config),
        "general.name": f"{result.manifest.stage}-{result.manifest.fingerprint[:8]}",
        **gguf_file.file_metadata(dtype),
        **words.metadata,
    }
    notes += write_file(file, merged, metadata, dtype)
    del merged  # reading back needs the memory
    gguf_file.refuse_other_metadata(file, metadata)
    mean_kl, largest = gguf_file.gap_of_file(file, result.rows, expected, dtype=dtype, max_gap=options.max_gap)
    notes.append(
        f"{dtype} costs {mean_kl:.2g} nats of KL per token on the test texts, read by transformers in float32; the "
        f"largest change of a log-probability is {largest:.3g}"
    )
    if options.llama_python is None:
        return [*notes, "it was not tested in llama.cpp (--llama-python)"]
    return notes + check_by_llama(
        Path(options.llama_python), file, result, expected, adds_bos=words.adds_bos, max_gap=options.max_gap
    )


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    request = json.loads(text)
    artifact, to = Path(request["artifact"]), Path(request["to"])
    base = None if request["base"] is None else Path(request["base"])
    silence_libraries()
    with explained(to.parent):
        print(export(artifact, base, to, ExportOptions(**request["options"]), run=request["run"]))
    return 0


def export(artifact: Path, base: Path | None, to: Path, options: ExportOptions, *, run: str | None = None) -> str:
    """Writes the folder ``to`` in one rename; returns notes about it. Raises ModelError."""
    result = exported_result(artifact, verify(artifact, content=True), base)
    partial = partial_folder(to)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        notes = _write(result, partial, options)
        if options.form != GGUF:  # a GGUF file holds the tokenizer
            result.tokenizer.save_pretrained(str(partial))
        _describe(result, partial, form=options.form, notes=notes, run=run)
        readable(partial)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "\n".join(notes)


def _write(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    if result.manifest.kind == REWARD_MODEL and options.form in _NO_REWARD_MODEL:
        raise ModelError(_NO_REWARD_MODEL[options.form], remedy=_AS_MODEL)
    if options.form == "adapter":
        return write_adapter(result, folder)
    if options.form == GGUF:
        return write_gguf(result, folder, options)
    if options.form == VLLM:
        return write_for_vllm(result, folder, options)
    if result.manifest.kind == REWARD_MODEL:
        return write_reward(result, folder)
    return write_policy(result, folder, max_gap=options.max_gap)


def _describe(result: ExportedResult, folder: Path, *, form: str, notes: Sequence[str], run: str | None) -> None:
    """Writes the card and the manifests of all stages on the way, without folders of this machine."""
    origin = provenance(result.artifact, result.manifest, run)
    files = sorted(file.name for file in folder.iterdir())
    turn_end = None if form in ("adapter", GGUF) else result.turn_end  # their lines render no conversation
    card = model_card(result.manifest, origin, form=form, turn_end=turn_end, notes=notes, files=files)
    (folder / "README.md").write_text(card, encoding="utf-8")
    steps = [_lineage(step.manifest) for step in origin.steps]
    (folder / "lineage.json").write_text(
        json.dumps({**steps[-1], "made_from": steps[:-1]}, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _lineage(manifest: Manifest) -> dict[str, Any]:
    record = {name: value for name, value in dataclasses.asdict(manifest).items() if name != "files"}
    record["base"] = {
        name: value_without_folders(str(value)) if name == "source" else value
        for name, value in manifest.base.items()
        if name != "path"
    }
    return record


if __name__ == "__main__":
    run_as_program(main)
