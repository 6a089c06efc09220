"""What is exported is read by plain transformers and PEFT and says what the stage's result said."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from alignment.commands.export import as_vllm
from alignment.commands.export.comparing import gap_between, logprobs_of_answers
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export, main
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.config.adapter import AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.config.sampling_engine import SamplingConfig
from alignment.core.errors import ArtifactError, ModelError
from alignment.data.tokens.tokenize import answer_ids, prompt_ids
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.assembly.start import load_start
from alignment.models.forward.answers import scalar_scores
from alignment.models.forward.rows import stream
from alignment.pipeline.execute.stored_results import artifact_of
from alignment.rewards.reward_models import Computation, TextScorer, load_external
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.sft.config import SftConfig
from tests.chained import Chained
from tests.oracles.close import close
from tests.tiny import (
    BASE_SOURCE,
    liven,
    publish_tiny,
    save_tiny_model,
    tiny_model,
    tiny_reward,
    tiny_spec,
    tiny_tokenizer,
)
from tests.unit.rewards.conftest import answers_to, prompt

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 2]])
IDENTITY = {"kind": "sft", "base": {"content": None, "dtype": "float32"}}
PROMPT = prompt("…", line=1)
KINDS = [AdapterKind.full, AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora]


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    """A model folder as a run's base."""
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def _trained(
    folder: Path,
    start: Lineage,
    kind: AdapterKind,
    chain: Chain = Chain.merge,
    identity: Mapping[str, Any] = IDENTITY,
) -> tuple[torch.Tensor, StageInput]:
    """What a trained policy says, and its artifact."""
    adapter = AdapterConfig(kind=kind, rank=4, chain=chain)
    model = load_start(start, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=CPU)
    liven(model)
    if kind is AdapterKind.full:
        model.model.norm.weight.data.mul_(1.5)
    config = SftConfig(adapter=adapter) if not start.adapters else DpoConfig(adapter=adapter)
    spec = tiny_spec(folder, config, base_path=start.base, identity=dict(identity))
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return logits, publish_tiny(spec, model, start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_becomes_a_plain_model(tmp_path: Path, base: Lineage, kind: AdapterKind) -> None:
    expected, saved = _trained(tmp_path, base, kind)
    notes = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    close(again, expected, rtol=1e-4, atol=1e-4)
    assert ("merging changed" in notes) == (kind is not AdapterKind.full)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base.base).chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["fingerprint"] in card
    assert not list((tmp_path / "out").glob("*.bin"))


def test_an_adapter_from_outside_is_exported_like_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    chained = Chained(tmp_path, architecture="qwen2")
    folder = chained.adapter_from_outside(torch.bfloat16)
    artifact = artifact_of(f"path:{folder}", tmp_path, Console())
    assert artifact == artifact_of(str(folder), tmp_path, Console()), "it is made once"
    export(artifact, chained.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    plain = AutoModelForCausalLM.from_pretrained(chained.base, dtype=torch.bfloat16)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(input_ids=IDS).logits
        assert torch.equal(again, PeftModel.from_pretrained(plain, folder).merge_and_unload()(input_ids=IDS).logits)
    assert "path:base" in (tmp_path / "out" / "README.md").read_text()
    (named,) = PolicyFinder(Console(), "none", tmp_path).policies([f"path:{folder}"])
    assert (named.artifact, named.base) == (str(artifact), str(chained.base))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    with pytest.raises(ModelError, match="names no base model"):
        artifact_of(str(folder), tmp_path, Console())


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora])
def test_an_exported_model_stops_where_it_stopped_here(tmp_path: Path, base: Lineage, kind: AdapterKind) -> None:
    """Plain transformers stops at what generation_config.json names, and at nothing that a template says."""
    file = base.base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [0, 9]}))
    _, saved = _trained(tmp_path, base, kind)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2, 9]


def test_the_base_s_ways_of_sampling_do_not_change_an_exported_policy(tmp_path: Path, base: Lineage) -> None:
    """A repetition penalty changes even the most likely tokens, and evaluations have none."""
    file = base.base / "generation_config.json"
    ways = {"do_sample": True, "repetition_penalty": 5.0, "temperature": 0.7, "top_k": 20}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ways}))
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "repetition_penalty" not in settings
    assert (settings["do_sample"], settings["temperature"], settings["top_k"]) == (True, 1.0, 0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    answer, expected = again.generate(IDS, do_sample=False, max_new_tokens=12), IDS
    with torch.no_grad():
        while expected.shape[1] < answer.shape[1]:
            expected = torch.cat([expected, again(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert answer.tolist() == expected.tolist()


def _output_of_card(folder: Path) -> str:
    """What the lines of Python in the exported folder's card print."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(str(folder)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.parametrize("has_template", [True, False])
def test_the_lines_of_a_card_answer(tmp_path: Path, *, has_template: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    base = Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base", tokenizer=tokenizer), adapters=())
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    assert _output_of_card(tmp_path / "out").startswith("<|im_start|>" if has_template else "…")


def test_stacked_adapters_become_one_model(tmp_path: Path, base: Lineage) -> None:
    _, saved = _trained(tmp_path, base, AdapterKind.qlora)
    sft_lineage = lineage(tiny_spec(tmp_path, DpoConfig(), base_path=base.base), saved)
    expected, saved = _trained(tmp_path, sft_lineage, AdapterKind.qlora, Chain.stack)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    close(again, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_stays_one(tmp_path: Path, base: Lineage) -> None:
    expected, saved = _trained(tmp_path, base, AdapterKind.lora)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.base), tmp_path / "out")
        close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base.base), "wherever it is read from"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("FOLDER_OF_THE_BASE", dtype="float32")' in card, "as export compared them"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())


def test_an_adapter_answers_with_the_ends_and_ways_of_sampling_of_the_policy(tmp_path: Path, base: Lineage) -> None:
    """Its base ends answers elsewhere and penalises repetition; the lines of the card load both."""
    file = base.base / "generation_config.json"
    ways = {"eos_token_id": [0, 9], "do_sample": True, "repetition_penalty": 5.0, "temperature": 0.7}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ways}))
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2, 9]
    assert (settings["do_sample"], settings["temperature"], settings["top_k"]) == (True, 1.0, 0)
    assert "repetition_penalty" not in settings
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    folders = {'"FOLDER_OF_THE_BASE"': repr(str(base.base)), '"FOLDER"': repr(str(tmp_path / "out"))}
    for name, folder in folders.items():
        code = code.replace(name, folder)
    loaded: dict[str, Any] = {}
    exec(code, loaded)
    generates = loaded["model"].get_base_model().generation_config
    assert (generates.eos_token_id, generates.temperature) == ([0, 2, 9], 1.0)


def test_an_adapter_on_a_model_that_scales_its_logits_stays_one(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", architecture="granitemoe")
    expected, saved = _trained(tmp_path, Lineage(source=BASE_SOURCE, base=folder, adapters=()), AdapterKind.lora)
    export(saved.path, folder, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out").eval()
        close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "granitemoe"])
def test_log_probabilities_of_answers_are_the_model_s_own(architecture: str) -> None:
    model = tiny_model(architecture)
    prompts, answers = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    for asked, answer, logprobs in zip(prompts, answers, logprobs_of_answers(model, prompts, answers), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*asked, *answer]])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(asked) - 1 + at, token]) for at, token in enumerate(answer)]
        assert logprobs == pytest.approx(expected, abs=1e-5)


def test_vllm_gets_most_of_the_memory_that_is_free_and_time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def session(config: SamplingConfig, **_: Any) -> Any:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(as_vllm, "EngineSession", session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8, 16))
    with pytest.raises(KeyboardInterrupt):
        as_vllm._vllm_answers(None, Path(), None, ExportOptions(form="vllm", max_gap=0.01))  # type: ignore[arg-type]
    assert [(config.gpu_share, config.start_timeout) for config in configs] == [(0.45, 1800.0)]


def test_an_adapter_is_exported_if_its_template_ends_no_turn(tmp_path: Path) -> None:
    """Continued pretraining learns no turns, so its base may have any template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    base = Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base", tokenizer=tokenizer), adapters=())
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    notes = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    assert "loaded by PEFT" in notes
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_an_adapter_names_the_folder_of_its_bundled_base_as_needed(tmp_path: Path, base: Lineage) -> None:
    saved = replace(base, source="bundled:smollm2-135m")
    _, policy = _trained(tmp_path, saved, AdapterKind.lora)
    notes = export(policy.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base.base), "no hub has a model of the bundled one's name"
    assert f"whoever loads it needs the base: {base.base}" in notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- whoever loads it needs the base: {base.base.name}\n" in card
    assert str(tmp_path) not in card, "a card may be published"


def test_an_adapter_names_the_commit_of_its_base_on_the_hub(tmp_path: Path, base: Lineage) -> None:
    """A branch moves; an adapter on other weights says something else."""
    identity = {"kind": "sft", "base": {"content": "hub:org/name@0123abcd", "dtype": "float32"}}
    _, policy = _trained(tmp_path, replace(base, source="hub:org/name@main"), AdapterKind.lora, identity=identity)
    export(policy.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "0123abcd")


def test_adapters_on_adapters_are_no_adapter_of_the_base(tmp_path: Path, base: Lineage) -> None:
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    sft_lineage = lineage(tiny_spec(tmp_path, DpoConfig(), base_path=base.base), saved)
    _, saved = _trained(tmp_path, sft_lineage, AdapterKind.lora)
    with pytest.raises(ModelError, match=r"1-dpo on 0-sft on path:tiny.*\n.*export it as a model"):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora])
def test_a_reward_model_becomes_a_sequence_classifier(tmp_path: Path, base: Lineage, kind: AdapterKind) -> None:
    saved = tiny_reward(tmp_path, AdapterConfig(kind=kind, rank=4), start=base, identity=IDENTITY)
    notes = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    spec = tiny_spec(tmp_path, DpoConfig(), base_path=base.base)
    ids = prompt_ids(tiny_tokenizer(), PROMPT.messages) + answer_ids(tiny_tokenizer(), PROMPT.messages, "…")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours = scalar_scores(load_reward_model(spec, saved, device=CPU), stream([ids, ids[:9]], CPU))
        batch = tokenizer.pad({"input_ids": [ids, ids[:9]]}, return_tensors="pt")
        exported_scores = plain(**batch).logits.squeeze(-1)
    assert ids[-1] == tokenizer.eos_token_id
    close(exported_scores - 0.5, ours, rtol=1e-4, atol=1e-4)
    assert "plus 0.5000" in notes
    assert tokenizer.pad_token_id not in ids
    assert float(_output_of_card(tmp_path / "out").split("(")[1].split(",")[0].rstrip(")\n")) == pytest.approx(
        float(exported_scores[0]), abs=1e-3
    )
    model, own_tokenizer = load_external(tmp_path / "out", Dtype.float32, source="path:out")
    run = Computation(device=CPU, dtype=Dtype.float32, tokens=1000)
    scorer = TextScorer(model, own_tokenizer, [PROMPT], run, source="path:out")
    close(scorer.scores(answers_to([PROMPT], ["…"])), exported_scores[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pad", "exported"), [("<|endoftext|>", "<|endoftext|>"), ("<|im_end|>", "<|im_start|>")])
def test_only_padding_that_ends_turns_is_replaced(tmp_path: Path, pad: str, exported: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token, tokenizer.pad_token = "<|im_start|>", pad
    folder = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    base = Lineage(source=BASE_SOURCE, base=folder, adapters=())
    saved = tiny_reward(tmp_path, AdapterConfig(rank=4), start=base, identity=IDENTITY)
    notes = export(saved.path, folder, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.pad_token == exported
    assert (f"its padding token is {pad}" in notes) == (pad == exported)


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora])
def test_a_reward_model_in_bfloat16_is_exported_and_keeps_its_head(
    tmp_path: Path, base: Lineage, kind: AdapterKind
) -> None:
    identity = {"kind": "reward", "base": {"content": None, "dtype": "bfloat16"}}
    saved = tiny_reward(tmp_path, AdapterConfig(kind=kind, rank=4), start=base, identity=identity)
    notes = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    assert "loaded in bfloat16, its head and scores are rounded, which changed scores by at most 0." in notes
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(plain.score.weight, load_file(saved.path / "head.safetensors")["weight"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_reward_model_is_no_adapter(tmp_path: Path, base: Lineage) -> None:
    """Its head and its offset would be lost."""
    saved = tiny_reward(tmp_path, AdapterConfig(rank=4), start=base, identity=IDENTITY)
    with pytest.raises(
        ModelError, match=r"an adapter cannot hold the head of a reward model and its offset\n.*export it as a model"
    ):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    assert not (tmp_path / "out").exists()


def test_a_fault_is_printed_with_its_kind(tmp_path: Path, base: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tiny_reward(tmp_path, AdapterConfig(rank=4), start=base, identity=IDENTITY)
    arguments = [str(saved.path), "--base", str(base.base), "--to", str(tmp_path / "out"), "--as", "adapter"]
    capsys.readouterr()
    assert main([*arguments, "--max-gap", "0.01"]) == 4
    assert capsys.readouterr().err.startswith("model: an adapter cannot hold the head of a reward model")


def test_a_prefix_is_an_adapter_and_no_model(tmp_path: Path, base: Lineage) -> None:
    adapter = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=3)
    model = load_start(base, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=CPU)
    model.prompt_encoder["default"].embedding.weight.data.normal_(std=0.5)
    spec = tiny_spec(tmp_path, SftConfig(adapter=adapter), base_path=base.base, identity=IDENTITY)
    saved = publish_tiny(spec, model, base)
    with pytest.raises(ModelError, match="a prefix cannot be merged"):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    with pytest.warns(FutureWarning, match="past_key_values"):  # PEFT names it so
        notes = export(saved.path, base.base, tmp_path / "out", ExportOptions(form="adapter", max_gap=0.01))
    assert "loaded by PEFT" in notes


def test_too_wide_a_gap_is_refused(tmp_path: Path, base: Lineage) -> None:
    identity = {"kind": "sft", "base": {"content": None, "dtype": "bfloat16"}}  # merged weights are rounded
    _, saved = _trained(tmp_path, base, AdapterKind.lora, identity=identity)
    with pytest.raises(ModelError, match=r"--max-gap allows 1e-07\n.*--max-gap"):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=1e-7))
    assert not (tmp_path / "out").exists()


def test_a_damaged_artifact_is_not_exported(tmp_path: Path, base: Lineage) -> None:
    _, saved = _trained(tmp_path, base, AdapterKind.lora)
    file = saved.path / "adapters/0-sft/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="content differs"):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))


def _damage(file: Path, part: str) -> None:
    """Doubles the weights of a written file whose names hold ``part``."""
    weights = load_file(file)
    assert any(part in name for name in weights)
    save_file({name: 2 * held if part in name else held for name, held in weights.items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (AdapterKind.full, "model"),
        (AdapterKind.lora, "model"),
        (AdapterKind.lora, "adapter"),
        (AdapterKind.full, "reward"),
        (AdapterKind.lora, "reward"),
    ],
)
def test_what_was_written_wrong_is_not_exported(
    tmp_path: Path, base: Lineage, monkeypatch: pytest.MonkeyPatch, kind: AdapterKind, form: str
) -> None:
    """A disk, a library or a bug of ours has changed a weight on its way into the file."""
    if form == "reward":
        saved = tiny_reward(tmp_path, AdapterConfig(kind=kind, rank=4), start=base, identity=IDENTITY)
    else:
        _, saved = _trained(tmp_path, base, kind)
    save_pretrained, copytree = PreTrainedModel.save_pretrained, shutil.copytree

    def save(model: PreTrainedModel, folder: str, **kwargs: Any) -> None:
        save_pretrained(model, folder, **kwargs)
        _damage(Path(folder) / "model.safetensors", "score" if form == "reward" else "layers.1.mlp.up_proj")

    def copy(source: Path, folder: Path) -> None:
        copytree(source, folder)
        _damage(Path(folder) / "adapter_model.safetensors", "lora_B")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    monkeypatch.setattr("alignment.commands.export.as_adapter.shutil.copytree", copy)
    export_form = "adapter" if form == "adapter" else "model"
    with pytest.raises(
        ModelError, match=r"the outputs of the written model differ by .* from the expected ones; nothing was exported"
    ):
        export(saved.path, base.base, tmp_path / "out", ExportOptions(form=export_form, max_gap=0.01))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_gap_is_a_mean_kl() -> None:
    before = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    after = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log()
    gap = gap_between(before, after)
    kl = 0.9 * torch.log(torch.tensor(1.5)) + 0.1 * torch.log(torch.tensor(0.25))
    assert gap.mean_kl == pytest.approx(float(kl) / 2, rel=1e-5)
    assert gap.largest == pytest.approx(float(torch.log(torch.tensor(4.0))), rel=1e-5)
