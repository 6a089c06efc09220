"""A GGUF file is read by transformers and gguf, and says what the stage's result said."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from alignment.commands.export import as_gguf
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.gguf_form import gguf_file
from alignment.commands.export.gguf_form.architectures import interleaved
from alignment.commands.export.worker import export, main
from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.core.errors import ModelError
from tests.exported import FULL, IDENTITY, LORA, tiny_base, trained_policy
from tests.oracles.close import close
from tests.oracles.rope import attention_score
from tests.tiny import tiny_reward, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 2]])
QLORA = AdapterConfig(kind=AdapterKind.qlora, rank=4)
F32 = ExportOptions(form="gguf", dtype="f32")


def _read(folder: Path, dtype: str = "f32") -> torch.Tensor:
    """What plain transformers computes with the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"model-{dtype}.gguf", dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if name[:4] != "GGUF"}


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (LORA, {}),
        (LORA, {"tie_word_embeddings": False}),
        (FULL, {"head_dim": 16}),
        (FULL, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
        (QLORA, {"num_key_value_heads": 1}),
        (LORA, {"architecture": "qwen2"}),
        (FULL, {"architecture": "qwen2", "tie_word_embeddings": True}),
        (LORA, {"architecture": "qwen3"}),
    ],
)
def test_a_policy_becomes_a_file_that_says_the_same(
    tmp_path: Path, adapter: AdapterConfig, changes: dict[str, Any]
) -> None:
    base = tiny_base(tmp_path, **changes)
    model, saved = trained_policy(tmp_path, base, adapter)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    export(saved.path, base.base, tmp_path / "out", F32)
    close(_read(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "Modelfile",
        "README.md",
        "lineage.json",
        "model-f32.gguf",
    ]


def test_the_metadata_are_those_of_the_specification(tmp_path: Path) -> None:
    changes = {"vocab_size": 340, "rms_norm_eps": 1e-5, "rope_theta": 5e4}
    base = tiny_base(tmp_path, **changes)
    _, saved = trained_policy(tmp_path, base)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf", dtype="f16"))
    fields = _fields(tmp_path / "out" / "model-f16.gguf")
    tokenizer = tiny_tokenizer()
    tokens = fields.pop("tokenizer.ggml.tokens")
    types = fields.pop("tokenizer.ggml.token_type")
    merges = fields.pop("tokenizer.ggml.merges")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == len(types) == len(set(tokens)) == 340
    assert types == [3, 3, 3] + [1] * (len(tokenizer) - 3) + [5] * (340 - len(tokenizer))
    assert merges[:2] == ["Ġ t", "Ġt h"]
    assert len(merges) == len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])
    assert fields == {
        "general.architecture": "llama",
        "general.name": "sft-0123abcd",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.vocab_size": 340,
        "llama.context_length": 4096,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5, rel=1e-6),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5e4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_written_once(tmp_path: Path, tied: bool) -> None:
    base = tiny_base(tmp_path, tie_word_embeddings=tied, num_hidden_layers=1)
    _, saved = trained_policy(tmp_path, base)
    export(saved.path, base.base, tmp_path / "out", F32)
    names = sorted(tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors)
    parts = ("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_norm", "ffn_up")
    whole = ["output_norm.weight", "token_embd.weight"]
    assert names == [f"blk.0.{part}.weight" for part in parts] + ([] if tied else ["output.weight"]) + whole


def test_interleaved_rows_give_the_scores_of_halves() -> None:
    """A query and a key of two heads, rotated in llama.cpp's way and in transformers' way."""
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2 * 8, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    for head in (slice(0, 8), slice(8, 16)):
        halves = [weight[head, 0].tolist() for weight in (query, key)]
        pairs = [interleaved(weight, 2)[head, 0].tolist() for weight in (query, key)]
        assert sorted(pairs[0]) == sorted(halves[0])
        for distance in (0, 1, 5, 40):
            close(
                attention_score(*pairs, distance=distance, interleaved=True),
                attention_score(*halves, distance=distance, interleaved=False),
                rtol=1e-9,
            )


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_a_narrow_type_costs_what_the_note_and_the_card_say(tmp_path: Path, dtype: str) -> None:
    base = tiny_base(tmp_path)
    model, saved = trained_policy(tmp_path, base)
    printed = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf", dtype=dtype, max_gap=0.5))
    (note,) = [line for line in printed.splitlines() if line.startswith(f"{dtype} costs")]
    assert note in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        before = model(input_ids=IDS).logits.log_softmax(-1)
    kl = (before.exp() * (before - _read(tmp_path / "out", dtype).log_softmax(-1))).sum(-1).mean()
    named = float(note.split()[2])
    assert 0 < kl < 20 * named < 10  # other rows than the fixed ones
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / f"model-{dtype}.gguf").tensors}
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" in name} == {"F32"}
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == dtype.upper()
    assert tensors["token_embd.weight"].tensor_type.name == dtype.upper()
    in_blocks = dtype == "q8_0"  # rows of 48 are not whole blocks of 32
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == ("F16" if in_blocks else dtype.upper())
    assert ("2 weights are f16, because" in printed) == in_blocks


def test_a_block_of_eight_bits_is_rounded_by_half_a_step_at_most(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    model, saved = trained_policy(tmp_path, base, FULL)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf", dtype="q8_0", max_gap=0.5))
    (tensor,) = (
        tensor
        for tensor in gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").tensors
        if tensor.name == "blk.1.attn_v.weight"
    )
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    exact = model.model.layers[1].self_attn.v_proj.weight.detach().numpy()
    steps = np.abs(exact).max(axis=1, keepdims=True) / 127  # a row is one block
    assert (np.abs(values - exact) <= 0.51 * steps + 1e-3 * np.abs(exact)).all()


def test_too_wide_a_gap_of_a_type_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base, FULL)
    with pytest.raises(
        ModelError, match=r"q8_0 costs .* nats of KL per token, more than 1e-09; nothing was exported\n"
    ):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf", dtype="q8_0", max_gap=1e-9))
    assert not list(tmp_path.glob("*out*"))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "gemma"},
            "the architecture gemma cannot be exported as GGUF; .* llama, qwen2, qwen3\n",
        ),
        ({"architecture": "gpt_neox"}, "the architecture gpt_neox cannot be exported as GGUF"),
        ({"attention_bias": True}, "llama with attention_bias: True cannot be exported as GGUF"),
        ({"mlp_bias": True}, "llama with mlp_bias: True"),
        ({"hidden_act": "gelu"}, "llama with hidden_act: gelu"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "llama with rope_type: linear",
        ),
        ({"architecture": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window: True"),
        ({"architecture": "qwen3", "head_dim": 16}, "qwen3 with head_dim: 16"),
    ],
)
def test_an_architecture_that_was_not_tested_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = tiny_base(tmp_path, **changes)
    _, saved = trained_policy(tmp_path, base)
    with pytest.raises(ModelError, match=message) as caught:
        export(saved.path, base.base, tmp_path / "out", F32)
    assert "--as model" in caught.value.remedy
    assert not list(tmp_path.glob("*out*"))


def test_a_reward_model_is_no_gguf_file(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    saved = tiny_reward(tmp_path, LORA, start=base, identity=IDENTITY)
    with pytest.raises(ModelError, match=r"no field for the head of a reward model and its offset\n.*as a model"):
        export(saved.path, base.base, tmp_path / "out", F32)


def test_a_prefix_is_no_gguf_file(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base, AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=3))
    with pytest.raises(ModelError, match="a prefix cannot be merged"):
        export(saved.path, base.base, tmp_path / "out", F32)


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    model, _ = trained_policy(tmp_path, base, FULL)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 7e4
    with pytest.raises(
        ModelError, match=r"ffn_up.weight has a weight of 7e\+04, which is too large for float16.*\n.*--dtype bf16"
    ):
        gguf_file.write_file(tmp_path / "x.gguf", model, {"general.architecture": "llama"}, "f16")


def test_a_template_that_ollama_cannot_write_is_refused_unless_the_file_alone_is_wanted(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    (base.base / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ loop.index ~ message.role ~ message.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ (messages | length + 1) ~ 'assistant' }}{% endif %}"
    )
    _, saved = trained_policy(tmp_path, base)
    with pytest.raises(ModelError, match=r"cannot be written for Ollama: .*\n.*--no-modelfile"):
        export(saved.path, base.base, tmp_path / "out", F32)
    export(saved.path, base.base, tmp_path / "out", dataclasses.replace(F32, has_modelfile=False))
    assert not (tmp_path / "out" / "Modelfile").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "$ llama-server --model model-f32.gguf --jinja" in card
    assert "ollama" not in card


# ---- faults while it is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.eos_token_id": 0}, r"a different tokenizer\.ggml\.eos_token_id; nothing was exported"),
        ({"llama.rope.freq_base": 5e3}, r"a different llama\.rope\.freq_base"),
    ],
)
def test_metadata_that_were_written_wrong_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base)
    write = as_gguf.write_file
    monkeypatch.setattr(
        as_gguf, "write_file", lambda file, model, values, dtype: write(file, model, values | change, dtype)
    )
    with pytest.raises(ModelError, match=message):
        export(saved.path, base.base, tmp_path / "out", F32)
    assert not list(tmp_path.glob("*out*"))


def test_weights_that_were_written_wrong_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base)
    quantize = gguf.quantize
    monkeypatch.setattr(gguf, "quantize", lambda values, kind: quantize(1.01 * values, kind))
    with pytest.raises(
        ModelError, match=r"outputs of the written model differ by .* from the expected ones; nothing was exported"
    ):
        export(saved.path, base.base, tmp_path / "out", F32)
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base)
    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", _on_a_full_disk)
    arguments = [str(saved.path), "--base", str(base.base), "--to", str(tmp_path / "out"), "--as", "gguf"]
    assert main(arguments) == 12
    assert "no space left on the device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def _on_a_full_disk(writer: Any, path: Path) -> None:
    """The device that is always full, in place of the file."""
    writer.fout = [open("/dev/full", "wb", buffering=0)]  # noqa: SIM115
    writer.state = gguf.gguf_writer.WriterState.EMPTY


def test_a_write_that_failed_has_the_systems_error() -> None:
    values = np.ones((4, 8), np.float32).view(gguf_file._Written)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:  # noqa: PT011
        values.tofile(full)
    assert caught.value.errno == errno.ENOSPC


def test_the_card_says_how_to_run_the_file(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    _, saved = trained_policy(tmp_path, base)
    printed = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "```console\n$ ollama create sft -f Modelfile\n$ ollama run sft\n" in card
    assert "$ llama-server --model model-f16.gguf --jinja\n```" in card
    assert "it was not tested in llama.cpp (--llama-python)" in printed
    assert "it was not tested in llama.cpp" in card


def test_the_default_rope_is_that_of_transformers() -> None:
    """The key that is read here: a configuration of another form would be written with a wrong base."""
    assert LlamaConfig().rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
