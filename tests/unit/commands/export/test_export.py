"""What is exported is read by plain transformers and PEFT and says what the stage's result said."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from alignment import cli
from alignment.commands.export import verb, worker
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.exported import gap_between, logprobs_of_answers
from alignment.commands.export.worker import export, main
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.config.launch import SamplingConfig
from alignment.config.model import AdapterConfig, AdapterKind, Chain, Dtype
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, ModelError
from alignment.data.tokens.tokenize import answer_ids, prompt_ids
from alignment.job import StageInput
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import Lineage, lineage
from alignment.models.forward.answers import scalar_scores
from alignment.models.forward.rows import stream
from alignment.pipeline.execute.stored_results import artifact_of
from alignment.rewards.reward_models import Computation, TextScorer, load_external
from alignment.stages.dpo.kind import DpoConfig
from tests.chained import FULL, IDENTITY, LORA, Chained, tiny_base, trained_policy
from tests.hub import weights_file
from tests.oracles.close import close
from tests.tiny import tiny_model, tiny_reward, tiny_spec, tiny_tokenizer
from tests.unit.rewards.conftest import answers_to, prompt

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 2]])
PROMPT = prompt("…", line=1)
IN_BFLOAT16 = {"kind": "sft", "base": {"content": None, "dtype": "bfloat16"}}
MODEL, ADAPTER = ExportOptions(form="model"), ExportOptions(form="adapter")
OF_BASE = {"eos_token_id": [0, 9], "do_sample": True, "repetition_penalty": 5.0, "temperature": 0.7, "top_k": 20}
"""The base ends answers elsewhere and samples in its own way, which must change no answer of a policy."""
OF_POLICY = {"eos_token_id": [0, 2, 9], "do_sample": True, "temperature": 1.0, "top_k": 0}


def _base(folder: Path, **changes: Any) -> Lineage:
    base = tiny_base(folder, **changes)
    file = base.base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **OF_BASE}))
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return _base(tmp_path_factory.mktemp("base"))


Trained = Callable[[AdapterKind], tuple[torch.Tensor, StageInput]]


@pytest.fixture(scope="module")
def policy(base: Lineage, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The logits of a trained policy with such an adapter, and its artifact."""

    @functools.cache
    def made(kind: AdapterKind) -> tuple[torch.Tensor, StageInput]:
        adapter = AdapterConfig(kind=kind, rank=4)
        model, saved = trained_policy(tmp_path_factory.mktemp(kind.value), base, adapter)
        return _logits(model), saved

    return made


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    assert "repetition_penalty" not in settings
    return {name: settings[name] for name in OF_POLICY}


def _run_card(folder: Path, base: Path) -> tuple[dict[str, Any], str]:
    """What the lines of Python in the exported folder's card define and print."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"FOLDER_OF_THE_BASE"', repr(str(base))).replace('"FOLDER"', repr(str(folder)))
    defined: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, defined)
    return defined, printed.getvalue()


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.dora, AdapterKind.qlora])
def test_a_policy_becomes_a_plain_model(tmp_path: Path, base: Lineage, policy: Trained, kind: AdapterKind) -> None:
    expected, saved = policy(kind)
    notes = export(saved.path, base.base, tmp_path / "out", MODEL)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(_logits(again), expected, rtol=1e-4, atol=1e-4)
    assert ("merging changed" in notes) == (kind is not AdapterKind.full)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base.base).chat_template
    fingerprint = json.loads((tmp_path / "out" / "lineage.json").read_text())["fingerprint"]
    assert fingerprint in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob("*.bin"))
    assert _settings(tmp_path / "out") == OF_POLICY
    answer, greedy = again.generate(IDS, do_sample=False, max_new_tokens=12), IDS
    with torch.no_grad():
        while greedy.shape[1] < answer.shape[1]:
            greedy = torch.cat([greedy, again(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert answer.tolist() == greedy.tolist()


@pytest.mark.parametrize("has_template", [True, False])
def test_the_lines_of_a_card_answer(tmp_path: Path, *, has_template: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    base = _base(tmp_path, tokenizer=tokenizer)
    _, saved = trained_policy(tmp_path, base)
    export(saved.path, base.base, tmp_path / "out", MODEL)
    _, printed = _run_card(tmp_path / "out", base.base)
    assert printed.startswith("<|im_start|>" if has_template else "…")


def test_stacked_adapters_become_one_model_and_no_adapter(tmp_path: Path, base: Lineage, policy: Trained) -> None:
    _, saved = policy(AdapterKind.qlora)
    sft_lineage = lineage(tiny_spec(tmp_path, DpoConfig(), base_path=base.base), saved)
    stacked = AdapterConfig(kind=AdapterKind.qlora, rank=4, chain=Chain.stack)
    model, saved = trained_policy(tmp_path, sft_lineage, stacked)
    export(saved.path, base.base, tmp_path / "out", MODEL)
    close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"1-dpo on 0-sft on path:tiny.*\n.*export it as a model"):
        export(saved.path, base.base, tmp_path / "second", ADAPTER)


def test_an_adapter_from_outside_is_exported_like_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    chained = Chained(tmp_path, architecture="qwen2")
    folder = chained.adapter_from_outside(torch.bfloat16)
    artifact = artifact_of(f"path:{folder}", tmp_path, Console())
    assert artifact == artifact_of(str(folder), tmp_path, Console()), "it is made once"
    export(artifact, chained.base, tmp_path / "out", MODEL)
    plain = AutoModelForCausalLM.from_pretrained(chained.base, dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(_logits(again), _logits(PeftModel.from_pretrained(plain, folder).merge_and_unload()))
    assert "path:base" in (tmp_path / "out" / "README.md").read_text()
    (named,) = PolicyFinder(Console(), "none", tmp_path).policies([f"path:{folder}"])
    assert (named.artifact, named.base) == (str(artifact), str(chained.base))
    (folder / "adapter_config.json").write_text(json.dumps({**_config(folder), "base_model_name_or_path": "/gone"}))
    with pytest.raises(ModelError, match="names no base model"):
        artifact_of(str(folder), tmp_path, Console())


@pytest.mark.parametrize("architecture", ["llama", "granitemoe"])
def test_an_adapter_stays_one(tmp_path: Path, architecture: str) -> None:
    """The second model scales its logits."""
    base = _base(tmp_path, architecture=architecture)
    model, saved = trained_policy(tmp_path, base)
    notes = export(saved.path, base.base, tmp_path / "out", ADAPTER)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.base), tmp_path / "out").eval()
    close(_logits(again), _logits(model.eval()), rtol=1e-4, atol=1e-4)
    assert _config(tmp_path / "out")["base_model_name_or_path"] == str(base.base), "wherever it is read from"
    assert f"whoever loads it needs the base: {base.base}" in notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- whoever loads it needs the base: {base.base.name}\n" in card
    assert str(tmp_path) not in card, "a card may be published"
    assert _settings(tmp_path / "out") == OF_POLICY
    defined, _ = _run_card(tmp_path / "out", base.base)
    loaded = defined["model"]
    assert loaded.dtype == torch.float32, "as export compared them"
    assert loaded.get_base_model().generation_config.eos_token_id == OF_POLICY["eos_token_id"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("source", "content", "named"),
    [
        ("bundled:smollm2-135m", None, (None, None)),  # no hub has a model of its name, so it is the folder
        ("hub:org/name@main", "hub:org/name@0123abcd", ("org/name", "0123abcd")),  # a branch moves
    ],
)
def test_an_adapter_names_its_base_as_peft_finds_it(
    tmp_path: Path, base: Lineage, source: str, content: str | None, named: tuple[str | None, str | None]
) -> None:
    identity = {"kind": "sft", "base": {"content": content, "dtype": "float32"}}
    _, saved = trained_policy(tmp_path, replace(base, source=source), identity=identity)
    export(saved.path, base.base, tmp_path / "out", ADAPTER)
    config = _config(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["revision"]) == (named[0] or str(base.base), named[1])


def test_an_adapter_is_exported_if_its_template_ends_no_turn(tmp_path: Path) -> None:
    """Continued pretraining learns no turns, so its base may have any template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    base = tiny_base(tmp_path, tokenizer=tokenizer)
    _, saved = trained_policy(tmp_path, base)
    export(saved.path, base.base, tmp_path / "out", ADAPTER)
    assert _settings(tmp_path / "out")["eos_token_id"] == [2]


def test_a_prefix_is_an_adapter_and_no_model(tmp_path: Path, base: Lineage) -> None:
    _, saved = trained_policy(tmp_path, base, AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=3))
    for form in ("model", "gguf"):
        with pytest.raises(ModelError, match="a prefix cannot be merged"):
            export(saved.path, base.base, tmp_path / "out", ExportOptions(form=form))
    with pytest.warns(FutureWarning, match="past_key_values"):  # PEFT names it so
        export(saved.path, base.base, tmp_path / "out", ADAPTER)
    assert _config(tmp_path / "out")["num_virtual_tokens"] == 3


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora])
def test_a_reward_model_becomes_a_sequence_classifier(tmp_path: Path, base: Lineage, kind: AdapterKind) -> None:
    saved = tiny_reward(tmp_path, AdapterConfig(kind=kind, rank=4), start=base, identity=IDENTITY)
    notes = export(saved.path, base.base, tmp_path / "out", MODEL)
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
    _, printed = _run_card(tmp_path / "out", base.base)
    assert float(printed.split("(")[1].split(",")[0].rstrip(")\n")) == pytest.approx(
        float(exported_scores[0]), abs=1e-3
    )
    model, own_tokenizer = load_external(tmp_path / "out", Dtype.float32, source="path:out")
    run = Computation(device=CPU, dtype=Dtype.float32, tokens=1000)
    scorer = TextScorer(model, own_tokenizer, [PROMPT], run, source="path:out")
    close(scorer.scores(answers_to([PROMPT], ["…"])), exported_scores[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [FULL, LORA])
def test_a_reward_model_in_bfloat16_keeps_its_head(tmp_path: Path, base: Lineage, adapter: AdapterConfig) -> None:
    saved = tiny_reward(tmp_path, adapter, start=base, identity=IN_BFLOAT16)
    notes = export(saved.path, base.base, tmp_path / "out", MODEL)
    assert "changed scores by at most 0." in notes
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(plain.score.weight, load_file(saved.path / "head.safetensors")["weight"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(("pad", "exported"), [("<|endoftext|>", "<|endoftext|>"), ("<|im_end|>", "<|im_start|>")])
def test_only_padding_that_ends_turns_is_replaced(tmp_path: Path, pad: str, exported: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token, tokenizer.pad_token = "<|im_start|>", pad
    base = _base(tmp_path, tokenizer=tokenizer)
    saved = tiny_reward(tmp_path, LORA, start=base, identity=IDENTITY)
    notes = export(saved.path, base.base, tmp_path / "out", MODEL)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.pad_token == exported
    assert (f"its padding token is {pad}" in notes) == (pad == exported)


def test_a_reward_model_is_only_a_model(tmp_path: Path, base: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    """Its head and its offset would be lost; vLLM would have nothing to answer with."""
    saved = tiny_reward(tmp_path, LORA, start=base, identity=IDENTITY)
    for form in ("adapter", "gguf", "vllm"):
        with pytest.raises(ModelError, match="export it as a model"):
            export(saved.path, base.base, tmp_path / "out", ExportOptions(form=form))
    capsys.readouterr()
    request = {"artifact": str(saved.path), "base": str(base.base), "to": str(tmp_path / "out"), "run": None}
    assert main([json.dumps({**request, "options": {"form": "adapter"}})]) == 4
    assert capsys.readouterr().err.startswith("model: an adapter cannot hold the head of a reward model")
    assert not list(tmp_path.glob("*out*"))


def test_too_wide_a_gap_is_refused(tmp_path: Path, base: Lineage) -> None:
    _, saved = trained_policy(tmp_path, base, identity=IN_BFLOAT16)  # merged weights are rounded
    with pytest.raises(ModelError, match=r"--max-gap allows 1e-07\n.*--max-gap"):
        export(saved.path, base.base, tmp_path / "out", replace(MODEL, max_gap=1e-7))
    assert not list(tmp_path.glob("*out*"))


def test_a_damaged_artifact_is_not_exported(tmp_path: Path, base: Lineage, policy: Trained) -> None:
    _, saved = policy(AdapterKind.lora)
    artifact = shutil.copytree(saved.path, tmp_path / "artifact")
    file = artifact / "adapters/0-sft/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="content differs"):
        export(artifact, base.base, tmp_path / "out", MODEL)


def _damage(file: Path, part: str) -> None:
    weights = load_file(file)
    assert any(part in name for name in weights)
    save_file({name: 2 * held if part in name else held for name, held in weights.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("form", ["model", "adapter", "reward"])
def test_what_was_written_wrong_is_not_exported(
    tmp_path: Path, base: Lineage, policy: Trained, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A disk, a library or a bug of ours has changed a weight on its way into the file."""
    if form == "reward":
        saved = tiny_reward(tmp_path, LORA, start=base, identity=IDENTITY)
    else:
        _, saved = policy(AdapterKind.lora)
    save_pretrained, copytree = PreTrainedModel.save_pretrained, shutil.copytree

    def save(model: PreTrainedModel, folder: str, **kwargs: Any) -> None:
        save_pretrained(model, folder, **kwargs)
        _damage(Path(folder) / "model.safetensors", "score" if form == "reward" else "layers.1.mlp.up_proj")

    def copy(source: Path, folder: Path) -> None:
        copytree(source, folder)
        _damage(Path(folder) / "adapter_model.safetensors", "lora_B")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    monkeypatch.setattr("alignment.commands.export.worker.shutil.copytree", copy)
    with pytest.raises(ModelError, match=r"outputs of the written model differ by .*; nothing was exported"):
        export(saved.path, base.base, tmp_path / "out", ADAPTER if form == "adapter" else MODEL)
    assert not list(tmp_path.glob("*out*"))


def test_the_gap_is_a_mean_kl() -> None:
    before = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    gap = gap_between(before, torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log())
    kl = 0.9 * torch.log(torch.tensor(1.5)) + 0.1 * torch.log(torch.tensor(0.25))
    assert gap == pytest.approx((float(kl) / 2, float(torch.tensor(4.0).log())), rel=1e-5)


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

    monkeypatch.setattr(worker, "EngineSession", session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8, 16))
    with pytest.raises(KeyboardInterrupt):
        worker._vllm_answers(None, Path(), None, ExportOptions(form="vllm"))  # type: ignore[arg-type]
    assert [(config.gpu_share, config.start_timeout) for config in configs] == [(0.45, 1800.0)]


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        (tmp_path / "content").mkdir()
        (tmp_path / "content/metrics.jsonl").touch()
        fields = {"stage": "sft", "kind": "policy", "fingerprint": "0" * 64, "identity": {}, "base": {"source": "self"}}
        publish(tmp_path / "content", tmp_path / "sft", Manifest(**{**fields, **changes}))
        return tmp_path / "sft"

    return make


def _drive(result: object, to: Path, options: ExportOptions = MODEL) -> int:
    return verb.export(Console(), str(result), to=str(to), options=options, output=to.parent / "none")


@pytest.mark.parametrize(
    ("changes", "to", "error"),
    [
        ({"kind": "evaluation"}, "out", ConfigError),
        ({}, "base", ConfigError),  # it exists already
        ({}, "no/out", ConfigError),
        ({"base": {"source": "path:gone", "path": "gone", "content": None}}, "out", ModelError),
        ({"base": {"source": "path:base", "path": "base", "content": "files-sha256:other"}}, "out", ModelError),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(
    tmp_path: Path, artifact: Callable[..., Path], changes: dict[str, Any], to: str, error: type[AlignmentError]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(weights_file())
    if "base" in changes:
        changes = {"base": {**changes["base"], "path": str(tmp_path / changes["base"]["path"])}}
    with pytest.raises(error):
        _drive(artifact(**changes), tmp_path / to)
    with pytest.raises(AlignmentError, match=r"quickstart/dpo: .* there is no such run"):
        _drive("quickstart/dpo", tmp_path / "out")


def _request(monkeypatch: pytest.MonkeyPatch, artifact: Path, to: Path, *words: str, code: int = 1) -> dict[str, Any]:
    requests: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "alignment.pipeline.backends.processes.call", lambda argv: requests.append(json.loads(argv[-1])) or 1
    )
    assert cli.main(["export", str(artifact), "--to", str(to), *words]) == code
    return requests[0]["options"] if requests else {}


def test_options_arrive_at_the_worker_and_only_with_their_form(
    tmp_path: Path, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, to = artifact(), tmp_path / "out"
    words = ["--as", "gguf", "--max-gap", "0.5", "--dtype", "bf16", "--llama-python", sys.executable, "--no-modelfile"]
    options = ExportOptions(form="gguf", max_gap=0.5, dtype="bf16", llama_python=sys.executable, has_modelfile=False)
    assert ExportOptions(**_request(monkeypatch, folder, to, *words)) == options
    vllm = _request(monkeypatch, folder, to, "--as", "vllm", "--engine-python", "x")
    assert ExportOptions(**vllm) == ExportOptions(form="vllm", engine_python="x")
    for form, given in (
        ("model", ["--dtype", "f16"]),
        ("adapter", ["--llama-python", "x"]),
        ("vllm", ["--no-modelfile"]),
        ("gguf", ["--engine-python", "x"]),
        ("gguf", ["--llama-python", str(tmp_path / "none")]),
    ):
        assert _request(monkeypatch, folder, to, "--as", form, *given, code=2) == {}
        assert f"configuration: {given[0]}: " in capsys.readouterr().err


def test_the_interpreter_is_the_one_named_or_the_one_that_was_built(
    tmp_path: Path, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, to = artifact(), tmp_path / "out"
    variable = "ALIGNMENT_LLAMA_CPP_PYTHON"
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert _request(monkeypatch, folder, to, "--as", "gguf")["llama_python"] is None
    built = tmp_path / "cache" / "alignment" / "engines" / "llama-cpp" / "bin" / "python"
    built.parent.mkdir(parents=True)
    built.symlink_to(sys.executable)  # as in an environment, whose interpreter must not be followed to its origin
    assert _request(monkeypatch, folder, to, "--as", "gguf")["llama_python"] == str(built)
    monkeypatch.setenv(variable, sys.executable)
    assert _request(monkeypatch, folder, to, "--as", "gguf")["llama_python"] == sys.executable
    assert _request(monkeypatch, folder, to)["llama_python"] is None
    monkeypatch.setenv(variable, str(tmp_path))
    _request(monkeypatch, folder, to, "--as", "gguf", code=2)
    assert f"configuration: {variable}: " in capsys.readouterr().err
