"""A run with policies that ``align serve`` serves: the base, an adapter on it, and an adapter on that one merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import TaskType
from transformers import PreTrainedTokenizerFast

from alignment.config.model import AdapterConfig, Dtype
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.start import load_start
from alignment.models.forward.generate import generate
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.living import descendants_of, is_living
from tests.templates import styled_tokenizer
from tests.tiny import BASE_SOURCE, liven, publish_tiny, tiny_model, tiny_spec

ARMS = ("base", "sft", "dpo")
END, EOS = 2, 0
"""``<|im_end|>``, which ends a turn, and ``<|endoftext|>``, at which alone the base's generation config stops."""
TOOL = {
    "type": "function",
    "function": {
        "name": "opening_hours",
        "description": "When a shop is open.",
        "parameters": {"type": "object", "properties": {"shop": {"type": "string"}}, "required": ["shop"]},
    },
}
HEAD_DIM = 32
"""The least that vLLM's attention takes on a CPU."""


def tokenizer_with_tools() -> PreTrainedTokenizerFast:
    """Turns and tools as Qwen writes them, and an end of text that ends no turn."""
    tokenizer = styled_tokenizer("qwen")
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


@dataclass(kw_only=True)
class ServedRun:
    """A run called ``mine`` under ``output``."""

    output: Path
    artifacts: dict[str, StageInput] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.output / "base"

    def add(self, stage: str, adapter: AdapterConfig, *, init: str = "base", seed: int = 0) -> None:
        """Publishes a policy whose adapter changes the model; ``init`` is what it starts from."""
        kind = {"sft": SftConfig, "dpo": DpoConfig}.get(stage, SftConfig)
        below = self.lineage(init)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = load_start(below, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=torch.device("cpu"))
            liven(model)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and parameter.requires_grad:
                parameter.data *= 0.3 + 0.1 * seed
        spec = tiny_spec(
            self.output,
            kind(adapter=adapter),
            stage=stage,
            identity={"kind": stage, "base": {"content": None, "dtype": "float32"}},
            artifact=self.output / "artifacts" / f"{stage}-{seed}",
            inputs={"init": self.artifacts.get(init, StageInput(ref="base", path=None))},
        )
        self.artifacts[stage] = publish_tiny(spec, model, below)
        self.record()

    def lineage(self, arm: str) -> Lineage:
        """What a policy consists of."""
        if arm == "base":
            return Lineage(source=BASE_SOURCE, base=self.base, adapters=())
        return lineage(tiny_spec(self.output, SftConfig()), self.artifacts[arm])

    def record(self) -> None:
        """Writes the record of the run."""
        stages = {name: {"kind": name, "artifact": str(saved.path)} for name, saved in self.artifacts.items()}
        folder = self.output / "runs" / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        model = {"source": f"path:{self.base}", "dtype": "float32"}
        (folder / "run.json").write_text(json.dumps({"config": {"model": model}, "stages": stages}))

    def answer(self, arm: str, messages: Sequence[dict[str, Any]], *, limit: int, **template: Any) -> OwnAnswer:
        """What our own generation answers, greedily, to the prompt that the policy's template renders."""
        folder = self.base if arm == "base" else Path(self.artifacts[arm].path or "") / "tokenizer"
        tokenizer = load_tokenizer(folder, model=self.base)
        prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **template)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        model = load_policy(self.lineage(arm), torch.float32)
        (answer,) = generate(model, [ids], max_new_tokens=limit, end_ids=[EOS, END], batch_size=1)
        return OwnAnswer(prompt=ids, ids=answer, text=tokenizer.decode(answer, skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class OwnAnswer:
    """Token ids of a prompt and its answer with the end, and the answer's text."""

    prompt: list[int]
    ids: list[int]
    text: str


def served_run(output: Path) -> ServedRun:
    """A run with the policies of ``ARMS``."""
    run = ServedRun(output=output)
    tokenizer = tokenizer_with_tools()
    model = tiny_model(vocab_size=len(tokenizer), head_dim=HEAD_DIM)
    with torch.no_grad():
        model.get_input_embeddings().weight[END] *= 1.4  # tied to the head: answers end by themselves now and then
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(str(run.base))
    tokenizer.save_pretrained(str(run.base))
    run.add("sft", AdapterConfig(rank=4), seed=1)
    run.add("dpo", AdapterConfig(rank=8, rslora=True), init="sft", seed=2)
    return run


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The command while it serves: its process, its address, the printed ``curl``, and its temporary folder."""

    process: subprocess.Popen[str]
    url: str
    curl: str
    temporary: Path
    printed: list[str]

    def processes(self) -> list[psutil.Process]:
        """The keeper, the server and their descendants."""
        named = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.temporary) in word for word in process.info["cmdline"] or ())
        ]
        descendants = [child for process in named for child in descendants_of(process)]
        return list({process.pid: process for process in (*named, *descendants)}.values())

    def has_left_nothing(self, processes: Sequence[psutil.Process]) -> bool:
        """Whether these processes, the folder and the port are gone."""
        living = [process for process in processes if is_living(process)]
        port = int(self.url.rpartition(":")[2].partition("/")[0])
        listeners = [
            connection for connection in psutil.net_connections() if connection.laddr and connection.laddr.port == port
        ]
        return (
            not living
            and not list(self.temporary.iterdir())
            and not any(connection.status == "LISTEN" for connection in listeners)
        )


def command(run: ServedRun, *arguments: str) -> list[str]:
    """The command line that serves the run."""
    return [sys.executable, "-m", "alignment.cli", "serve", "mine", "--output", str(run.output), *arguments]


@contextmanager
def serving(run: ServedRun, *arguments: str, **variables: str) -> Iterator[Serving]:
    """The command, once it serves; it is killed at the end if it still runs."""
    temporary = Path(tempfile.mkdtemp(prefix="serving-"))  # a short path: sockets of vLLM have at most 107 characters
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(
        command(run, "--port", "0", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        printed: list[str] = []
        for line in process.stdout:
            printed.append(line.rstrip())
            if line.startswith("  curl "):
                break
        else:
            raise AssertionError("\n".join(printed))
        (url,) = [line.split()[2] for line in printed if line.startswith("serving at ")]
        yield Serving(process=process, url=url, curl=printed[-1].strip(), temporary=temporary, printed=printed)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        shutil.rmtree(temporary)


def client(serving: Serving, key: str = "none") -> Any:
    """The client of OpenAI."""
    from openai import OpenAI

    return OpenAI(base_url=serving.url, api_key=key, max_retries=0, timeout=120)
