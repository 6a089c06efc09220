"""Which policies one vLLM server holds, what it loads, and with which command it is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.serve import verb
from alignment.commands.serve.verb import vllm_command, worker_command
from alignment.commands.serve.vllm_layout import VllmArm, VllmFiles, VllmLayout, refuse_prefix, vllm_layout
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.core.artifacts import MANIFEST
from alignment.core.errors import ConfigError, ModelError
from tests.served import ServedRun, served_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    run = served_run(tmp_path_factory.mktemp("layout"))
    run.add("dora", AdapterConfig(kind=AdapterKind.dora, rank=4), seed=3)
    run.add("prefix", AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=2), seed=4)
    run.add("full", AdapterConfig(kind=AdapterKind.full), seed=5)
    run.add("heads", AdapterConfig(rank=4, modules_to_save=["embed_tokens"]), seed=6)
    run.add("wide", AdapterConfig(rank=510), init="sft", seed=7)
    return run


def policies(run: ServedRun, *arms: str) -> list[StoredPolicy]:
    """These policies of the run."""
    return PolicyFinder(Console(), "mine", run.output).policies(arms)


def folder(run: ServedRun, stage: str, adapter: str) -> Path:
    """That of an adapter in a policy's artifact."""
    return Path(run.artifacts[stage].path or "") / "adapters" / adapter


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
    files = VllmFiles(folder=Path("/there"))
    assert files.adapter(layout.arms[0]) == folder(run, "sft", "0-sft"), "as training wrote it"
    assert files.adapter(replace(layout.arms[1], name="b/dpo")) == Path("/there/adapters/b%2Fdpo")


def test_a_single_policy_is_served_by_its_own_weights(run: ServedRun) -> None:
    assert vllm_layout(policies(run, "base")) == VllmLayout(weights=run.base, weights_name="base")
    for merged in ("sft", "dpo", "dora", "heads"):
        assert vllm_layout(policies(run, merged)) == VllmLayout(weights=None, weights_name=merged)
    whole = Path(run.artifacts["full"].path or "") / "model"
    assert vllm_layout(policies(run, "full")) == VllmLayout(weights=whole, weights_name="full")


@pytest.mark.parametrize(
    ("arms", "reason"),
    [
        (("base", "dora"), "dora cannot be one of them: it has a DoRA adapter, which vLLM cannot serve as an adapter"),
        (("base", "full"), "full cannot be one of them: it is not based on the same weights as base"),
        (("full", "sft"), "sft cannot be one of them: it is not based on the same weights as full"),
        (("sft", "heads"), "heads cannot be one of them: it contains whole modules: embed_tokens"),
        (("sft", "wide"), "wide cannot be one of them: its adapters have rank 514 in total, and vLLM takes"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_works(
    run: ServedRun, arms: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        vllm_layout(policies(run, *arms))
    assert refused.value.remedy == "use --engine transformers, or serve one arm at a time"
    assert refused.value.where == "--arm"


def test_other_weights_below_the_adapters_are_refused(run: ServedRun) -> None:
    base, sft = policies(run, "base", "sft")
    with pytest.raises(ConfigError, match="its weights are bfloat16, but base has float32"):
        vllm_layout([base, replace(sft, dtype="bfloat16")])
    with pytest.raises(ConfigError, match="'base' is the name of the base model"):
        vllm_layout([sft, replace(sft, name="base")])
    whole = policies(run, "full")[0]
    with pytest.raises(ConfigError, match="it has weights of its own"):
        vllm_layout([whole, replace(whole, name="again")])


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
    prefix, sft = policies(run, "prefix", "sft")
    with pytest.raises(ModelError, match="prefix has a prefix, which cannot be merged into weights"):
        refuse_prefix(prefix)
    refuse_prefix(sft)
    refuse_prefix(policies(run, "base")[0])


def test_the_command_names_every_arm_and_the_least_rank_that_fits(
    run: ServedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb.hardware, "count_devices", lambda: 0)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    files = VllmFiles(folder=Path("/there"))
    layout = vllm_layout(policies(run, "base", "sft", "dpo"))
    command = vllm_command(Path("/python"), files, layout, dtype="float32", api_key="", tool_parser=None)
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
    assert command.environment["VLLM_API_KEY"] == "", "one that the caller has for something else is not asked for"
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert command.environment["HF_HUB_OFFLINE"] == "1"


def test_a_merged_policy_has_no_adapters_and_may_have_a_key(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb.hardware, "count_devices", lambda: 1)
    layout = vllm_layout(policies(run, "dpo"))
    files = VllmFiles(folder=Path("/there"))
    command = vllm_command(
        Path("/python"), files, layout, dtype="bfloat16", api_key="secret", tool_parser="llama3_json"
    )
    argv = list(command.argv)
    assert argv[argv.index("--model") + 1 : argv.index("--model") + 4] == [
        "/there/weights",
        "--served-model-name",
        "dpo",
    ]
    assert argv[argv.index("--tool-call-parser") + 1] == "llama3_json"
    assert not {"--enable-lora", "--lora-modules", "--enforce-eager"} & set(argv)
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(argv), "other users of this machine see arguments"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment


def test_the_users_own_cache_size_stays(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb.hardware, "count_devices", lambda: 0)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    layout = vllm_layout(policies(run, "base"))
    command = vllm_command(
        Path("/python"), VllmFiles(folder=Path("/there")), layout, dtype="float32", api_key="", tool_parser=None
    )
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_the_worker_is_offline(run: ServedRun) -> None:
    command = worker_command("transformers serve", Path("/there/serve.json"))
    assert list(command.argv)[1:] == ["-m", "alignment.commands.serve.worker", "/there/serve.json", "{port}"]
    assert command.environment["HF_HUB_OFFLINE"] == "1"
