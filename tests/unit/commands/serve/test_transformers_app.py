"""The app of the default engine: which models it knows, and what it cannot be made to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from rich.console import Console
from transformers import AutoTokenizer

from alignment.commands.serve.loaded_arms import generation_config, lineage_and_tokenizer, load_arms
from alignment.commands.serve.vllm_files import write_files
from alignment.commands.serve.vllm_layout import VllmFiles
from alignment.commands.shared.libraries import PAGE_LIBRARIES
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.core.errors import DataError, ModelError
from alignment.core.fingerprint import digest
from alignment.models.assembly.load import load_policy
from tests.asked_app import Answered, asking
from tests.served import END, EOS, TOOL, ServedRun, served_run, tokenizer_with_tools

ABSENT = [name for name in PAGE_LIBRARIES if importlib.util.find_spec(name) is None]
needs_libraries = pytest.mark.skipif(bool(ABSENT), reason=f"the engine needs {', '.join(ABSENT)}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return served_run(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def ask(run: ServedRun) -> Callable[..., Answered]:
    """Calls the app of two arms in this process; returns status and body."""
    return asking(load_arms(PolicyFinder(Console(), "mine", run.output).policies(["sft", "dpo"])))


def chat(model: str) -> dict[str, Any]:
    """A request for one token."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1, "temperature": 0}


@needs_libraries
def test_the_app_lists_the_arms_and_answers_for_them(ask: Callable[..., Answered]) -> None:
    status, listed = ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in listed["data"]] == ["sft", "dpo"]
    status, reply = ask("POST", "/v1/chat/completions", chat("dpo"))
    assert (status, reply["model"], reply["usage"]["completion_tokens"]) == (200, "dpo", 1)


@needs_libraries
def test_a_page_that_points_its_own_name_at_this_machine_is_refused(ask: Callable[..., Answered]) -> None:
    assert ask("GET", "/v1/models", host="localhost:8000")[0] == 200
    status, text = ask("POST", "/v1/chat/completions", chat("dpo"), host="evil.example:8000")
    assert (status, text) == (400, "Invalid host header")


def test_the_base_of_a_result_has_the_template_that_the_result_was_trained_with(tmp_path: Path) -> None:
    run = served_run(tmp_path)
    artifact = Path(run.artifacts["sft"].path or "")
    file, text = artifact / "tokenizer/chat_template.jinja", "{{ 'asked: ' + messages[0]['content'] }}"
    assert file.is_file(), "transformers saves it under this name"
    file.write_text(text)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["identity"]["base"]["chat_template"] = digest(text)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    (base,) = PolicyFinder(Console(), str(artifact), run.output).policies(["base"])
    _, tokenizer = lineage_and_tokenizer(base)
    assert tokenizer.chat_template == text


@needs_libraries
def test_no_endpoint_loads_another_model(ask: Callable[..., Answered], run: ServedRun) -> None:
    name = str(run.base)
    message = f"there is no model {name!r} here, only: sft, dpo"
    for path, body in [
        ("/v1/chat/completions", chat(name)),
        ("/v1/completions", {"model": name, "prompt": "Hi."}),
    ]:
        status, reply = ask("POST", path, body)
        assert (status, reply["error"]["message"]) == (404, message), path
    status, reply = ask("POST", "/v1/chat/completions", chat("sft:weights.gguf"))
    assert (status, reply["error"]["message"]) == (404, "there is no model 'sft:weights.gguf' here, only: sft, dpo")


def test_answers_end_where_training_ended_them_and_are_drawn_from_the_whole_distribution(run: ServedRun) -> None:
    (arm,) = load_arms(PolicyFinder(Console(), "mine", run.output).policies(["dpo"]))
    config = arm.model.generation_config
    assert sorted(config.eos_token_id) == [EOS, END]
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 1.0, 1.0, 0)
    assert config.pad_token_id == EOS
    expected = load_policy(run.lineage("dpo"), torch.float32).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in arm.model.state_dict().items())


def test_a_policy_without_a_template_is_named(run: ServedRun, tmp_path: Path) -> None:
    (policy,) = PolicyFinder(Console(), "mine", run.output).policies(["base"])
    tokenizer = tokenizer_with_tools()
    tokenizer.chat_template = None
    copy = ServedRun(output=tmp_path)
    copy.base.mkdir()
    tokenizer.save_pretrained(str(copy.base))
    with pytest.raises(DataError, match="no chat template") as refused:
        load_arms([type(policy)(name="base", described="", artifact=None, base=str(copy.base), dtype="float32")])
    assert refused.value.where == "base"


def test_the_files_of_vllm_have_template_ends_and_merged_weights(run: ServedRun, tmp_path: Path) -> None:
    files = VllmFiles(folder=tmp_path)
    write_files(PolicyFinder(Console(), "mine", run.output).policies(["dpo"]), files)
    assert (files.tokenizer / "chat_template.jinja").read_text() == tokenizer_with_tools().chat_template
    generation = json.loads((files.generation / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [EOS, END]
    assert generation["top_k"] == 0
    assert (files.merged / "model.safetensors").is_file()


@pytest.mark.parametrize("several", [False, True])
def test_vllm_refuses_tools_that_the_template_leaves_out(run: ServedRun, tmp_path: Path, several: bool) -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (base,) = PolicyFinder(Console(), "mine", run.output).policies(["base"])
    copy = tmp_path / "base"
    tokenizer = tokenizer_with_tools()
    tokenizer.chat_template = {"default": plain, "other": plain} if several else plain
    shutil.copytree(run.base, copy, ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer.save_pretrained(str(copy))
    files = VllmFiles(folder=tmp_path)
    write_files([type(base)(name="base", described="", artifact=None, base=str(copy), dtype="float32")], files)
    served = AutoTokenizer.from_pretrained(str(files.tokenizer))
    turns = [{"role": "user", "content": "Hi."}]
    assert served.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nHi.<|im_end|>\n"
    with pytest.raises(TemplateError, match="tools"):
        served.apply_chat_template(turns, tools=[TOOL], tokenize=False)


def test_several_policies_share_one_tokenizer_and_one_set_of_ends(run: ServedRun, tmp_path: Path) -> None:
    base, sft = PolicyFinder(Console(), "mine", run.output).policies(["base", "sft"])
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = type(base)(
        name="base", described="", artifact=None, base=base.base, dtype="float32", chat_template=f"path:{template}"
    )
    with pytest.raises(
        ModelError, match="sft has a different chat template than base, and one vLLM server can have only one"
    ):
        write_files([other, sft], VllmFiles(folder=tmp_path))


def test_generation_ends_are_those_of_the_tokenizer() -> None:
    tokenizer = tokenizer_with_tools()
    assert generation_config(tokenizer).eos_token_id == [EOS, END]
