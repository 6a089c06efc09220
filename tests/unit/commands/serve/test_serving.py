"""What ``align serve`` refuses before it starts a server, what a server loads, and with which command it starts."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from alignment.commands.serve import verb, worker
from alignment.commands.serve.loaded_arms import lineage_and_tokenizer, load_arms, write_files, write_sum
from alignment.commands.serve.verb import Options, serve, vllm_command
from alignment.commands.serve.vllm_layout import (
    VllmArm,
    VllmFiles,
    VllmLayout,
    refuse_prefix,
    vllm_layout,
)
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.commands.shared.stored_policy import StoredPolicy, write_error, written_error
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.core.artifacts import MANIFEST
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, DataError, DiskError, ModelError
from alignment.core.fingerprint import digest
from alignment.models.assembly.load import load_policy
from alignment.records.run import RunRecord, StageEntry
from tests.served import END, EOS, TOOL, ServedRun, served_run, tokenizer_with_tools

THERE = VllmFiles(folder=Path("/there"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    run = served_run(tmp_path_factory.mktemp("serving"))
    run.add("dora", AdapterConfig(kind=AdapterKind.dora, rank=4), seed=3)
    run.add("prefix", AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=2), seed=4)
    run.add("full", AdapterConfig(kind=AdapterKind.full), seed=5)
    run.add("heads", AdapterConfig(rank=4, modules_to_save=["embed_tokens"]), seed=6)
    run.add("wide", AdapterConfig(rank=510), init="sft", seed=7)
    young = run.output / "runs" / "young"
    young.mkdir()
    RunRecord(name="young", stages={"sft": StageEntry(kind="sft", state="planned", artifact="/nowhere")}).write(young)
    return run


def policies(run: ServedRun, *arms: str, of: str = "mine") -> list[StoredPolicy]:
    return PolicyFinder(Console(), of, run.output).policies(arms)


def folder(run: ServedRun, stage: str, adapter: str) -> Path:
    return Path(run.artifacts[stage].path or "") / "adapters" / adapter


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(verb, "Keeper", start)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(
    ("words", "options", "code", "where", "message"),
    [
        (("mine", "dpp"), {}, 2, "", "did you mean 'dpo'?"),
        (("other",), {}, 2, "other", "there is no such run"),
        (("mine", "sft", "sft"), {}, 2, "--arm", "2 arms are called sft"),
        (("young",), {}, 7, "", "no stage of this run has produced a policy yet"),
        (("young", "sft"), {}, 7, "", "no complete artifact here"),
        (("mine",), {"engine_python": "x"}, 2, "--engine-python", "only vLLM"),
        (("mine",), {"engine": "vllm", "api_key_env": "UNSET_KEY"}, 2, "--api-key-env", "UNSET_KEY"),
        (("mine",), {"engine": "vllm", "api_key_env": "EMPTY_KEY"}, 2, "--api-key-env", "EMPTY_KEY"),
        (("mine",), {"engine": "vllm", "engine_python": "/none"}, 2, "--engine-python", "not an interpreter"),
        (("mine", "dpo"), {"port": 65536}, 2, "--port", "65536 is not a port"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    run: ServedRun,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    options: dict[str, Any],
    code: int,
    where: str,
    message: str,
) -> None:
    monkeypatch.setenv("EMPTY_KEY", "")
    with pytest.raises(AlignmentError) as caught:
        serve(Console(), words[0], words[1:], options=Options(**{"port": 0, **options}), output=run.output)
    assert message in caught.value.message
    assert (caught.value.exit_code, caught.value.where.endswith(where)) == (code, True)


def test_an_error_of_the_worker_reaches_the_driver_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "merged"))

    assert written_error(tmp_path / "error.json") is None
    for kind in (ConfigError, DataError, ModelError, ArtifactError):
        write_error(tmp_path / "error.json", kind("it is damaged", where="there", remedy="mend it"))
        error = written_error(tmp_path / "error.json")
        assert (type(error), error.message, error.where, error.remedy) == (kind, "it is damaged", "there", "mend it")
    monkeypatch.setattr("alignment.commands.serve.loaded_arms.write_files", full)
    settings = tmp_path / "serve.json"
    settings.write_text(json.dumps({"policies": [], "engine": "vllm"}))
    assert worker.main([str(settings), "0"]) == DiskError.exit_code
    error = written_error(tmp_path / "error.json")
    assert (type(error), error.where) == (DiskError, str(tmp_path / "merged"))


def test_an_arm_has_the_weights_and_ends_of_training_and_the_whole_distribution(run: ServedRun) -> None:
    (arm,) = load_arms(policies(run, "dpo"))
    config = arm.model.generation_config
    assert sorted(config.eos_token_id) == [EOS, END]
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 1.0, 1.0, 0)
    assert config.pad_token_id == EOS
    expected = load_policy(run.lineage("dpo"), torch.float32).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in arm.model.state_dict().items())


def test_the_base_of_a_result_has_the_template_that_the_result_was_trained_with(tmp_path: Path) -> None:
    run = served_run(tmp_path)
    artifact = Path(run.artifacts["sft"].path or "")
    text = "{{ 'asked: ' + messages[0]['content'] }}"
    (artifact / "tokenizer/chat_template.jinja").write_text(text)
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["identity"]["base"]["chat_template"] = digest(text)
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    _, tokenizer = lineage_and_tokenizer(*policies(run, "base", of=str(artifact)))
    assert tokenizer.chat_template == text


def test_the_files_of_vllm_have_template_ends_and_merged_weights(run: ServedRun, tmp_path: Path) -> None:
    files = VllmFiles(folder=tmp_path)
    write_files(policies(run, "dpo"), files)
    assert (files.tokenizer / "chat_template.jinja").read_text() == tokenizer_with_tools().chat_template
    generation = json.loads((files.generation / "generation_config.json").read_text())
    assert (sorted(generation["eos_token_id"]), generation["top_k"]) == ([EOS, END], 0)
    expected = load_policy(run.lineage("dpo"), torch.float32).state_dict()
    weights = load_file(files.merged / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    assert len(weights) > 10


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [PLAIN, {"default": PLAIN, "other": PLAIN}])
def test_vllm_refuses_tools_that_the_template_leaves_out(run: ServedRun, tmp_path: Path, template: Any) -> None:
    copy = tmp_path / "base"
    tokenizer = tokenizer_with_tools()
    tokenizer.chat_template = template
    shutil.copytree(run.base, copy, ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer.save_pretrained(str(copy))
    files = VllmFiles(folder=tmp_path)
    write_files([replace(policies(run, "base")[0], base=str(copy))], files)
    served = AutoTokenizer.from_pretrained(str(files.tokenizer))
    turns = [{"role": "user", "content": "Hi."}]
    assert served.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nHi.<|im_end|>\n"
    with pytest.raises(TemplateError, match="tools"):
        served.apply_chat_template(turns, tools=[TOOL], tokenize=False)


def test_several_policies_share_one_tokenizer_and_one_set_of_ends(run: ServedRun, tmp_path: Path) -> None:
    base, sft = policies(run, "base", "sft")
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    with pytest.raises(ModelError, match="sft has a different chat template than base"):
        write_files([replace(base, chat_template=f"path:{template}"), sft], VllmFiles(folder=tmp_path))


Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"
INPUTS, OUTPUTS = 6, 5


def saved(folder: Path, rank: int, modules: list[str], *, alpha: int, rslora: bool = False, seed: int) -> Path:
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for module in modules:
        factors[f"{module}.lora_A.weight"] = torch.randn(rank, INPUTS, generator=rng)
        factors[f"{module}.lora_B.weight"] = torch.randn(OUTPUTS, rank, generator=rng)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    names = [module.rpartition(".")[2] for module in modules]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": names}))
    return folder


def change(folder: Path, module: str, scale: float) -> Tensor:
    """What an adapter adds to the weight of a module: ``[outputs, inputs]``, in float64 and entry by entry."""
    factors = load_file(folder / "adapter_model.safetensors")
    first, second = (factors[f"{module}.lora_{name}.weight"].double() for name in "AB")
    rows = [
        [sum(scale * second[row, at] * first[at, column] for at in range(first.shape[0])) for column in range(INPUTS)]
        for row in range(OUTPUTS)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_the_sum_adds_to_each_weight_what_all_adapters_add(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", 2, [Q, V], alpha=8, seed=1)
    second = saved(tmp_path / "second", 4, [Q], alpha=6, rslora=True, seed=2)
    write_sum([first, second], tmp_path / "deep" / "sum")
    config = json.loads((tmp_path / "deep/sum/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    expected = {Q: change(first, Q, 8 / 2) + change(second, Q, 6 / 4**0.5), V: change(first, V, 8 / 2)}
    for module, added in expected.items():
        torch.testing.assert_close(change(tmp_path / "deep/sum", module, 6 / 6), added, rtol=1e-5, atol=1e-5)
    save_file({f"{Q}.weight": torch.zeros(2, 2)}, first / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj\.weight, which is not a factor"):
        write_sum([first, second], tmp_path / "sum")


def test_several_policies_are_sums_of_adapters_on_their_base(run: ServedRun) -> None:
    layout = vllm_layout(policies(run, "sft", "base", "dpo"))
    assert layout == VllmLayout(
        weights=run.base,
        weights_name="base",
        arms=(
            VllmArm(name="sft", folders=(folder(run, "sft", "0-sft"),), rank=4),
            VllmArm(name="dpo", folders=(folder(run, "dpo", "0-sft"), folder(run, "dpo", "1-dpo")), rank=12),
        ),
    )
    assert THERE.adapter(layout.arms[0]) == folder(run, "sft", "0-sft"), "as training wrote it"
    assert THERE.adapter(replace(layout.arms[1], name="b/dpo")) == Path("/there/adapters/b%2Fdpo")


def test_a_single_policy_is_served_by_its_own_weights(run: ServedRun) -> None:
    assert vllm_layout(policies(run, "base")) == VllmLayout(weights=run.base, weights_name="base")
    for merged in ("dpo", "dora", "heads"):
        assert vllm_layout(policies(run, merged)) == VllmLayout(weights=None, weights_name=merged)
    whole = Path(run.artifacts["full"].path or "") / "model"
    assert vllm_layout(policies(run, "full")) == VllmLayout(weights=whole, weights_name="full")


@pytest.mark.parametrize(
    ("arms", "changes", "reason"),
    [
        (("base", "dora"), {}, "dora cannot be one of them: it has a DoRA adapter"),
        (("base", "full"), {}, "full cannot be one of them: it is not based on the same weights as base"),
        (("sft", "heads"), {}, "heads cannot be one of them: it contains whole modules: embed_tokens"),
        (("sft", "wide"), {}, "wide cannot be one of them: its adapters have rank 514 in total"),
        (("base", "sft"), {"dtype": "bfloat16"}, "its weights are bfloat16, but base has float32"),
        (("dpo", "sft"), {"name": "base"}, "'base' is the name of the base model"),
        (("full", "full"), {"name": "again"}, "it has weights of its own"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_works(
    run: ServedRun, arms: tuple[str, str], changes: dict[str, str], reason: str
) -> None:
    first, second = (policies(run, arm)[0] for arm in arms)
    with pytest.raises(ConfigError, match=reason) as refused:
        vllm_layout([first, replace(second, **changes)])
    assert refused.value.where == "--arm"
    assert ("--engine transformers" in refused.value.remedy) == ("is the name of" not in reason)


def test_adapters_on_four_bits_are_refused_together_and_merged_alone(run: ServedRun, tmp_path: Path) -> None:
    (sft,) = policies(run, "sft")
    manifest = json.loads((Path(sft.artifact or "") / MANIFEST).read_text())
    manifest["adapters_stood"] = {"adapters/0-sft": {"merged": False, "nf4": True}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "adapters").symlink_to(Path(sft.artifact or "") / "adapters")
    quantised = replace(sft, name="qlora", artifact=str(tmp_path))
    with pytest.raises(ConfigError, match="qlora cannot be one of them: its adapters were trained on weights in"):
        vllm_layout([sft, quantised])
    assert vllm_layout([quantised]).weights is None


def test_a_prefix_is_refused_by_every_engine(run: ServedRun) -> None:
    prefix, *others = policies(run, "prefix", "sft", "base")
    with pytest.raises(ModelError, match="prefix has a prefix"):
        refuse_prefix(prefix)
    for policy in others:
        refuse_prefix(policy)


def test_the_command_names_every_arm_and_the_least_rank_that_fits(
    run: ServedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb.hardware, "count_devices", lambda: 0)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    layout = vllm_layout(policies(run, "base", "sft", "dpo"))
    command = vllm_command(Path("/python"), THERE, layout, dtype="float32", api_key="", tool_parser=None)
    assert list(command.argv) == [
        *("/python", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(run.base), "--served-model-name", "base"),
        *("--tokenizer", "/there/tokenizer", "--generation-config", "/there/generation"),
        *("--dtype", "float32", "--max-model-len", "-1"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--host", "127.0.0.1", "--port", "{port}", "--disable-uvicorn-access-log"),
        *("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2"),
        "--lora-modules",
        json.dumps({"name": "sft", "path": str(folder(run, "sft", "0-sft"))}),
        json.dumps({"name": "dpo", "path": "/there/adapters/dpo"}),
        *("--enforce-eager", "--no-enable-chunked-prefill"),
    ]
    environment = command.environment
    assert environment["VLLM_API_KEY"] == "", "one that the caller has for something else is not asked for"
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["HF_HUB_OFFLINE"]) == ("1", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    command = vllm_command(Path("/python"), THERE, layout, dtype="float32", api_key="", tool_parser=None)
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_a_merged_policy_has_no_adapters_and_may_have_a_key(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb.hardware, "count_devices", lambda: 1)
    layout = vllm_layout(policies(run, "dpo"))
    python, parser = Path("/python"), "llama3_json"
    command = vllm_command(python, THERE, layout, dtype="bfloat16", api_key="secret", tool_parser=parser)
    argv = list(command.argv)
    start = argv.index("--model") + 1
    assert argv[start : start + 3] == ["/there/weights", "--served-model-name", "dpo"]
    assert argv[argv.index("--tool-call-parser") + 1] == parser
    assert not {"--enable-lora", "--lora-modules", "--enforce-eager"} & set(argv)
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(argv), "other users of this machine see arguments"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment
