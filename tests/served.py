"""A run with policies that ``align serve`` serves: the base, an adapter on it, and an adapter on that one merged."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from peft import TaskType
from transformers import PreTrainedTokenizerFast

from alignment.commands.serve.loaded_arms import LoadedArm
from alignment.config.model import AdapterConfig, Dtype
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.roles import load_start
from alignment.models.forward.generate import generate
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.living import descendants_of, is_living, wait_until
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
        if arm == "base":
            return Lineage(source=BASE_SOURCE, base=self.base, adapters=())
        return lineage(tiny_spec(self.output, SftConfig()), self.artifacts[arm])

    def record(self) -> None:
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
        process.stdout.close()
        shutil.rmtree(temporary)


def client(serving: Serving, key: str = "none") -> Any:
    from openai import OpenAI

    return OpenAI(base_url=serving.url, api_key=key, max_retries=0, timeout=120)


Answered = tuple[int, Any]


class AskedApp:
    """The app of these arms in this process; a call returns the status and the body."""

    def __init__(self, arms: Sequence[LoadedArm]) -> None:
        from alignment.commands.serve.transformers_app import application

        self._app = application(arms)

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        host: str = "127.0.0.1:8000",
        content_type: str = "application/json",
    ) -> Answered:
        """Asks once; a body of bytes is sent as it is."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = [(b"content-type", content_type.encode()), (b"host", host.encode())]
        sent = asyncio.run(self._call(method, path, content, headers, patience=3600))
        text = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(text) if text.startswith((b"{", b"[")) else text.decode() or None

    def leave(self, path: str, bodies: Sequence[Any], *, after: float) -> None:
        """Asks with each body at once; the clients go away after so many seconds."""
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]

        async def all_at_once() -> None:
            contents = [json.dumps(body).encode() for body in bodies]
            await asyncio.gather(*(self._call("POST", path, content, headers, after) for content in contents))

        asyncio.run(all_at_once())

    async def _call(
        self, method: str, path: str, content: bytes, headers: Any, patience: float
    ) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(patience)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app({**scope, "app": self._app}, receive, send)
        return sent


def asking(arms: Sequence[LoadedArm]) -> AskedApp:
    return AskedApp(arms)


QUESTIONS = ("Hi.", "When is the shop open?", "Where are the keys?", "Say only what the text says.", "Why?")
LIMIT = 12


def answers_are_ours(served: Serving, run: ServedRun, **options: Any) -> list[tuple[Any, OwnAnswer]]:
    """Greedy answers of each arm equal ours, with as many tokens, and end where ours end; returns each reply with ours.
    ``options`` are added to each request."""
    answered, ended_by_template = [], 0
    with client(served) as asked:
        assert {model.id for model in asked.models.list()} == set(ARMS)
        for arm, question in itertools.product(ARMS, QUESTIONS):
            messages = [{"role": "user", "content": question}]
            ours = run.answer(arm, messages, limit=LIMIT)
            reply = asked.chat.completions.create(
                model=arm, messages=messages, max_tokens=LIMIT, temperature=0, extra_body=options
            )
            (choice,) = reply.choices
            assert reply.model == arm
            assert whole_characters(choice.message.content) == whole_characters(ours.text)
            assert choice.finish_reason in _reasons(ours)
            assert reply.usage.prompt_tokens == len(ours.prompt)
            assert reply.usage.completion_tokens == len(ours.ids)
            ended_by_template += len(ours.ids) < LIMIT and ours.ids[-1] == END
            answered.append((reply, ours))
    assert ended_by_template >= 3, "answers end at a token that the base's own generation config does not name"
    assert len({ours.text for _, ours in answered}) > 2 * len(QUESTIONS), "the arms differ"
    return answered


def _reasons(ours: OwnAnswer) -> set[str]:
    """Why an answer may have ended; of an end that is the last token allowed, transformers says it was the length."""
    by_end, by_length = ours.ids[-1] in (END, EOS), len(ours.ids) == LIMIT
    return {reason for reason, holds in (("stop", by_end), ("length", by_length)) if holds}


def whole_characters(text: str) -> str:
    """Without a character at the end of which some bytes are missing: transformers writes it as �, vLLM leaves it."""
    return text.rstrip("\ufffd")


def tools_reach_the_template(served: Serving, run: ServedRun) -> None:
    """The prompt is what the template makes of system turn, tools, a call and its result."""
    call = {"name": "opening_hours", "arguments": {"shop": "bakery"}}
    sent = {"name": "opening_hours", "arguments": '{"shop": "bakery"}'}
    turns = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "When is the bakery open?"}]
    result = {"role": "tool", "tool_call_id": "1", "content": "from 8 to 12"}
    cases = [
        (turns, turns),
        (
            [
                *turns,
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                result,
            ],
            [
                *turns,
                {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": sent}]},
                result,
            ],
        ),
    ]
    for rendered, messages in cases:
        ours = run.answer("dpo", rendered, limit=LIMIT, tools=[TOOL])
        without = run.answer("dpo", rendered, limit=LIMIT)
        assert len(ours.prompt) > len(without.prompt)
        with client(served) as asked:
            reply = asked.chat.completions.create(
                model="dpo", messages=messages, tools=[TOOL], max_tokens=LIMIT, temperature=0
            )
        assert reply.usage.prompt_tokens == len(ours.prompt)
        assert whole_characters(reply.choices[0].message.content) == whole_characters(ours.text)


def the_server_takes_nothing_else(served: Serving, run: ServedRun) -> None:
    """Neither a folder of this machine nor a model of the hub is served."""
    with client(served) as asked:
        for name in (str(run.base), "gpt2", "sft@main", "sft:model.gguf"):
            with pytest.raises(openai.NotFoundError):
                asked.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi."}])


def nothing_is_left_after(serving: Serving, number: signal.Signals) -> None:
    """Neither process, port nor temporary folder is left after a signal to the command."""
    processes = serving.processes()
    assert len(processes) >= 2
    assert not serving.has_left_nothing(processes)
    serving.process.send_signal(number)
    assert serving.process.wait(timeout=60) == (0 if number is signal.SIGINT else -number)
    wait_until(lambda: serving.has_left_nothing(processes))
