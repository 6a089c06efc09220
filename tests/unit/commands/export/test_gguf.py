"""A GGUF file is read by transformers and gguf, and says what the stage's result said; a llama.cpp is believed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.commands.export import worker
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.exported import TEXTS, exported_result, logprobs
from alignment.commands.export.gguf_form import gguf_file, llama_cpp_check
from alignment.commands.export.gguf_form.gguf_file import interleaved
from alignment.commands.export.gguf_form.llama_cpp_check import ask, check_by_llama
from alignment.commands.export.worker import export, main
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.core.artifacts import verify
from alignment.core.errors import AlignmentError, ConfigError, ModelError
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenize import encode
from alignment.data.turns import Message
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from tests.chained import FULL, LORA, tiny_base, trained_policy
from tests.oracles.close import close
from tests.oracles.rope import attention_score
from tests.tiny import tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 2]])
QLORA = AdapterConfig(kind=AdapterKind.qlora, rank=4)
F32 = ExportOptions(form="gguf", dtype="f32")

Trained = tuple[Any, StageInput, Lineage]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("policy")
    base = tiny_base(folder)
    return *trained_policy(folder, base, FULL), base


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _read(folder: Path, dtype: str = "f32") -> torch.Tensor:
    file = f"model-{dtype}.gguf"
    return _logits(AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32))


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (LORA, {"num_hidden_layers": 1}),
        (FULL, {"head_dim": 16}),
        (FULL, {"num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": False}),
        (QLORA, {"num_key_value_heads": 1}),
        (LORA, {"architecture": "qwen2"}),
        (LORA, {"architecture": "qwen3"}),
    ],
)
def test_a_policy_becomes_a_file_that_says_the_same(
    tmp_path: Path, adapter: AdapterConfig, changes: dict[str, Any]
) -> None:
    base = tiny_base(tmp_path, **changes)
    model, saved = trained_policy(tmp_path, base, adapter)
    export(saved.path, base.base, tmp_path / "out", F32)
    close(_read(tmp_path / "out"), _logits(model), rtol=1e-4, atol=1e-4)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["Modelfile", "README.md", "lineage.json", "model-f32.gguf"]
    if changes.get("num_hidden_layers") == 1:
        names = sorted(tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / files[-1]).tensors)
        parts = ("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_norm", "ffn_up")
        untied = [] if changes.get("tie_word_embeddings", True) else ["output.weight"]
        whole = ["output_norm.weight", "token_embd.weight"]
        assert names == [f"blk.0.{part}.weight" for part in parts] + untied + whole


def test_the_metadata_are_those_of_the_specification(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, vocab_size=340, rms_norm_eps=1e-5, rope_theta=5e4)
    _, saved = trained_policy(tmp_path, base)
    printed = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf"))
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name[:4] != "GGUF"}
    tokenizer = tiny_tokenizer()
    tokens, types, merges = (fields.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
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
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "```console\n$ ollama create sft -f Modelfile\n$ ollama run sft\n" in card
    assert "$ llama-server --model model-f16.gguf --jinja\n```" in card
    assert "it was not tested in llama.cpp" in card
    assert "it was not tested in llama.cpp" in printed


def test_interleaved_rows_give_the_scores_of_halves() -> None:
    """A query and a key of two heads, rotated in llama.cpp's way and in transformers' way."""
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2 * 8, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    for head in (slice(0, 8), slice(8, 16)):
        halves = [weight[head, 0].tolist() for weight in (query, key)]
        pairs = [interleaved(weight, 2)[head, 0].tolist() for weight in (query, key)]
        assert sorted(pairs[0]) == sorted(halves[0])
        for distance in (0, 1, 40):
            actual = attention_score(*pairs, distance=distance, interleaved=True)
            close(actual, attention_score(*halves, distance=distance, interleaved=False), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_a_narrow_type_costs_what_the_note_and_the_card_say(tmp_path: Path, policy: Trained, dtype: str) -> None:
    model, saved, base = policy
    options = ExportOptions(form="gguf", dtype=dtype, max_gap=0.5)
    printed = export(saved.path, base.base, tmp_path / "out", options)
    (note,) = [line for line in printed.splitlines() if line.startswith(f"{dtype} costs")]
    assert note in (tmp_path / "out" / "README.md").read_text()
    before = _logits(model).log_softmax(-1)
    kl = (before.exp() * (before - _read(tmp_path / "out", dtype).log_softmax(-1))).sum(-1).mean()
    assert 0 < kl < 20 * float(note.split()[2]) < 10  # other rows than the fixed ones
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / f"model-{dtype}.gguf").tensors}
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" in name} == {"F32"}
    assert tensors["token_embd.weight"].tensor_type.name == dtype.upper()
    in_blocks = dtype == "q8_0"  # rows of 48 are not whole blocks of 32
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == ("F16" if in_blocks else dtype.upper())
    assert ("2 weights are f16, because" in printed) == in_blocks
    values = tensors["blk.1.attn_v.weight"]
    assert values.tensor_type.name == dtype.upper()
    exact = model.model.layers[1].self_attn.v_proj.weight.detach().numpy()
    steps = np.abs(exact).max(axis=1, keepdims=True) / 127  # a row is one block of eight bits
    rounded = gguf.dequantize(values.data, values.tensor_type)
    assert (np.abs(rounded - exact) <= 0.51 * steps + 1e-3 * np.abs(exact)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "the architecture gemma .* llama, qwen2, qwen3\n"),
        ({"attention_bias": True}, "llama with attention_bias: True"),
        ({"hidden_act": "gelu"}, "llama with hidden_act: gelu"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, "rope_type: linear"),
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


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model, _ = trained_policy(tmp_path, tiny_base(tmp_path), FULL)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 7e4
    with pytest.raises(ModelError, match=r"ffn_up.weight has a weight of 7e\+04.*\n.*--dtype bf16"):
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


@pytest.mark.parametrize(
    ("options", "metadata", "factor", "message"),
    [
        (F32, {"tokenizer.ggml.eos_token_id": 0}, 1.0, r"a different tokenizer\.ggml\.eos_token_id; nothing"),
        (F32, {"llama.rope.freq_base": 5e3}, 1.0, r"a different llama\.rope\.freq_base; nothing"),
        (F32, {}, 1.01, "outputs of the written model differ by .*; nothing"),
        (ExportOptions(form="gguf", dtype="q8_0", max_gap=1e-9), {}, 1.0, r"q8_0 costs .* more than 1e-09; nothing"),
    ],
)
def test_what_was_written_wrong_is_not_exported(
    tmp_path: Path,
    policy: Trained,
    monkeypatch: pytest.MonkeyPatch,
    options: ExportOptions,
    metadata: dict[str, Any],
    factor: float,
    message: str,
) -> None:
    _, saved, base = policy
    write, quantize = worker.write_file, gguf.quantize
    monkeypatch.setattr(
        worker, "write_file", lambda file, model, values, dtype: write(file, model, values | metadata, dtype)
    )
    monkeypatch.setattr(gguf, "quantize", lambda values, kind: quantize(factor * values, kind))
    with pytest.raises(ModelError, match=message):
        export(saved.path, base.base, tmp_path / "out", options)
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_is_named(
    tmp_path: Path, policy: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device that is always full, in place of the file; first of the header, then of the weights."""
    _, saved, base = policy

    def open_full(writer: Any, path: Path) -> None:
        writer.fout = [open("/dev/full", "wb", buffering=0)]  # noqa: SIM115
        writer.state = gguf.gguf_writer.WriterState.EMPTY

    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", open_full)
    request = {"artifact": str(saved.path), "base": str(base.base), "to": str(tmp_path / "out"), "run": None}
    assert main([json.dumps({**request, "options": {"form": "gguf"}})]) == 12
    assert "no space left on the device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        np.ones((4, 8), np.float32).view(gguf_file._Written).tofile(full)


def _interpreter(folder: Path, program: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return path


class Checked:
    """A policy, its log-probabilities, and the reply of a llama.cpp that agrees."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        model, saved, base = trained
        self.folder, self.max_gap = folder, 0.0
        self.result = exported_result(saved.path, verify(saved.path, content=True), base.base)
        self.expected = logprobs(model, self.result.rows)
        prompt = prompt_text(self.result.tokenizer, [Message(role="user", content=TEXTS[1])])
        self.reply: dict[str, Any] = {
            "version": "0.3.36",
            "ids": [encode(self.result.tokenizer, text) for text in (*TEXTS, prompt)],
            "likeliest": [self.expected.argmax(-1).tolist()],
            "ends": [2],
            "adds_bos": False,
        }

    def notes(self, *, adds_bos: bool = False) -> list[str]:
        program = (
            "import json, sys\nrequest = json.load(open(sys.argv[2]))\n"
            f'json.dump(request, open({str(self.folder / "request.json")!r}, "w"))\n'
            f'open(sys.argv[3], "w").write({json.dumps(self.reply)!r})\n'
        )
        python = _interpreter(self.folder, program)
        return check_by_llama(
            python, self.folder / "m.gguf", self.result, self.expected, adds_bos=adds_bos, max_gap=self.max_gap
        )


@pytest.fixture
def checked(tmp_path: Path, policy: Trained) -> Checked:
    return Checked(tmp_path, policy)


def test_a_file_that_is_read_alike_is_said_to_be(tmp_path: Path, checked: Checked) -> None:
    assert checked.notes() == [
        "llama.cpp (llama-cpp-python 0.3.36) tokenizes the test texts in the same way, and predicts the same token "
        f"at 100.0% of {len(checked.expected)} positions"
    ]
    request = json.loads((tmp_path / "request.json").read_text())
    assert (request["model"], request["rows"], request["wide_cache"]) == (
        str(tmp_path / "m.gguf"),
        checked.result.rows,
        True,
    )
    checked.reply["ends"] = [0]
    _, *ends = checked.notes()
    assert [("also" in end, end.rpartition(" ")[2]) for end in ends] == [(True, "<|endoftext|>"), (False, "<|im_end|>")]


@pytest.mark.parametrize(
    ("change", "adds_bos", "message"),
    [
        (lambda reply: reply["ids"][0].pop(), False, r"tokenizes 'The shop is closed .* differently"),
        (lambda reply: reply["ids"][-1].pop(0), False, r"tokenizes '<\|im_start\|>system.* differently"),
        (lambda reply: reply.update(adds_bos=True), False, "puts BOS in front of texts"),
        (lambda reply: None, True, "does not put BOS in front of texts"),
    ],
)
def test_a_reply_that_differs_is_refused(checked: Checked, change: Any, adds_bos: bool, message: str) -> None:
    change(checked.reply)
    with pytest.raises(ModelError, match=f"llama.cpp {message}; nothing was exported"):
        checked.notes(adds_bos=adds_bos)


@pytest.mark.parametrize(
    ("wrong", "max_gap", "is_refused"), [(0.08, 0.0, False), (0.12, 0.0, True), (0.12, 0.1, True), (0.12, 3.0, False)]
)
def test_other_predictions_are_refused_from_a_tenth_on(
    checked: Checked, wrong: float, max_gap: float, is_refused: bool
) -> None:
    tokens = len(checked.expected)
    likeliest = torch.arange(tokens) % 90
    nearly_even = torch.zeros(tokens, 100)
    nearly_even[torch.arange(tokens), likeliest] = 2.0  # nats more likely than the others
    checked.expected, checked.max_gap = nearly_even.log_softmax(-1), max_gap
    likeliest[: int(wrong * tokens)] += 1
    checked.reply["likeliest"] = [likeliest.tolist()]
    if is_refused:
        with pytest.raises(ModelError, match=r"at only 8\d\.\d% of the positions"):
            checked.notes()
    else:
        assert f" same token at {1 - int(wrong * tokens) / tokens:.1%}" in checked.notes()[0]


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (None, ConfigError, r"has no llama-cpp-python\n.*make engine-llama"),
        ("raise ValueError('Failed to load')", ModelError, "cannot read .*: ValueError: Failed to load; nothing"),
        ("import os\nos.abort()", ModelError, "cannot read the written file: exit code -6"),
        ("import time\ntime.sleep(60)", ModelError, r"did not answer within 0\.5 s"),
    ],
)
def test_an_interpreter_that_does_not_read_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, error: type[AlignmentError], message: str
) -> None:
    monkeypatch.setattr(llama_cpp_check, "SECONDS", 0.5 if program and "sleep" in program else 60.0)
    with pytest.raises(error, match=message):
        ask(Path(sys.executable) if program is None else _interpreter(tmp_path, program), tmp_path / "m.gguf")
