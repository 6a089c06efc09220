"""What every server of ``align serve`` must answer, whatever engine it has."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import openai
import pytest

from tests.patience import wait_until
from tests.served import ARMS, END, EOS, TOOL, OwnAnswer, ServedRun, Serving, client

QUESTIONS = ("Hi.", "When is the shop open?", "Where are the keys?", "Say only what the text says.", "Why?")
LIMIT = 12


def answers_are_ours(served: Serving, run: ServedRun, **options: Any) -> list[tuple[Any, OwnAnswer]]:
    """Greedy answers of each arm equal ours, with as many tokens, and end where ours end; returns each reply with ours.

    ``options`` are added to each request.
    """
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
    turns = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "When is the bakery open?"},
    ]
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
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "type": "function", "function": sent}],
                },
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
