"""``align serve`` with vLLM: three policies as adapters on one base, and a merged one by itself."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from alignment.config.model import AdapterConfig, AdapterKind
from tests.served import (
    ARMS,
    TOOL,
    ServedRun,
    Serving,
    answers_are_ours,
    client,
    nothing_is_left_after,
    served_run,
    serving,
    the_server_takes_nothing_else,
    tools_reach_the_template,
)

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return served_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(run: ServedRun, vllm_python: Path) -> Iterator[Serving]:
    """The three policies behind one address."""
    arms = [word for arm in ARMS for word in ("--arm", arm)]
    with serving(run, *arms, "--engine", "vllm", "--engine-python", str(vllm_python)) as process:
        yield process


def test_each_arm_answers_as_our_own_generation_and_stops_where_training_ended_answers(
    served: Serving, run: ServedRun
) -> None:
    for reply, ours in answers_are_ours(served, run, return_token_ids=True):
        assert reply.choices[0].token_ids == ours.ids
        assert reply.prompt_token_ids == ours.prompt


def test_a_system_turn_and_tools_are_rendered_by_the_template(served: Serving, run: ServedRun) -> None:
    tools_reach_the_template(served, run)
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "When?"}]
    ours = run.answer("sft", messages, limit=2, tools=[TOOL])
    body = json.dumps({"model": "sft", "messages": messages, "tools": [TOOL]}).encode()
    address = served.url.removesuffix("/v1") + "/tokenize"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        assert json.load(reply)["tokens"] == ours.prompt


def test_no_other_model_is_loaded_whoever_asks(served: Serving, run: ServedRun) -> None:
    the_server_takes_nothing_else(served, run)


def test_a_merged_policy_is_served_with_a_key(run: ServedRun, vllm_python: Path) -> None:
    """A DoRA adapter, which vLLM does not hold beside weights; then nothing is left after SIGKILL."""
    run.add("dora", AdapterConfig(kind=AdapterKind.dora, rank=4), seed=3)
    arguments = ["--arm", "dora", "--engine", "vllm", "--engine-python", str(vllm_python), "--api-key-env", "SERVE_KEY"]
    with serving(run, *arguments, SERVE_KEY="opened") as process:
        assert '-H "Authorization: Bearer $SERVE_KEY"' in process.curl
        messages = [{"role": "user", "content": "When is the shop open?"}]
        with client(process, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="dora", messages=messages)
        ours = run.answer("dora", messages, limit=8)
        with client(process, "opened") as asked:
            reply = asked.chat.completions.create(
                model="dora", messages=messages, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
            )
        assert reply.choices[0].token_ids == ours.ids
        nothing_is_left_after(process, signal.SIGKILL)


def test_nothing_is_left_after_ctrl_c(run: ServedRun, vllm_python: Path) -> None:
    arguments = ["--arm", "base", "--engine", "vllm", "--engine-python", str(vllm_python)]
    with serving(run, *arguments) as process:
        nothing_is_left_after(process, signal.SIGINT)
