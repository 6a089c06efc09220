"""A template that loops for ever, which a model folder of anybody's may hold, is stopped and named."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from alignment.core import deadline
from alignment.core.errors import ModelError
from alignment.data.records import Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.rendering import render
from alignment.data.tokens.row_kinds import PROMPTS, tokenized
from alignment.data.turns import Message
from tests.tiny import tiny_tokenizer

ASKED = (Message(role="user", content="Hi."),)
LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
OVER_TEXT = (
    "{% macro f(n) %}{% for c in messages[0]['content'] %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
    "{{ f(40) }}"
)


@pytest.fixture
def tokenizer() -> Any:
    """Of a model whose template a test may set."""
    return tiny_tokenizer()


@pytest.mark.parametrize("template", [LOOPS, OVER_TEXT], ids=["loops over numbers", "loops over the row"])
def test_a_template_that_does_not_end_stops_at_its_first_row(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of a row, which would be counted, and the next row be tried."""
    monkeypatch.setattr(deadline, "SECONDS", 0.05)
    before = signal.getsignal(signal.SIGPROF)
    tokenizer.chat_template = template
    records = [Prompt(messages=ASKED, where=f"rows.jsonl:{number}") for number in (1, 2)]
    with pytest.raises(
        ModelError, match=r"rows.jsonl:1: the chat template ran for more than 10 s for one rendering"
    ) as caught:
        list(tokenized(tokenizer, PROMPTS, records, Limits(row=100)))
    assert "model.chat_template=chatml" in caught.value.remedy
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_only_one_rendering_is_bounded_and_not_all_of_them(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    texts, end = set(), time.thread_time() + 0.5
    with deadline.watched():
        while time.thread_time() < end:
            texts.add(render(tokenizer, ASKED, answering=True))
    assert len(texts) == 1


def test_what_runs_in_c_and_hears_of_no_exception_ends_its_process() -> None:
    code = (
        "from alignment.core import deadline; deadline.SECONDS = 0.05; deadline.KILLED_SECONDS = 0.2\n"
        "with deadline.Bounded(ValueError()): sum(range(10**12))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -deadline.KILLED_BY


def test_a_profiler_of_a_c_library_is_no_fault(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python knows nothing of its handler, and cannot put it back."""
    real = signal.signal

    def signal_of_c(number: int, handler: Any) -> Any:
        before = real(number, handler)
        return None if handler is deadline._look else before

    monkeypatch.setattr(signal, "signal", signal_of_c)
    before = signal.getsignal(signal.SIGPROF)
    try:
        assert "Hi." in render(tokenizer, ASKED, answering=True)
        assert signal.getsignal(signal.SIGPROF) is signal.SIG_IGN, "its next signal ends no process"
    finally:
        real(signal.SIGPROF, before)


def test_another_thread_renders_without_a_bound(tokenizer: Any) -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render(tokenizer, ASKED, answering=True)))
    thread.start()
    thread.join()
    assert texts == [render(tokenizer, ASKED, answering=True)]
