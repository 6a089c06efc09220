"""Warnings are errors (pyproject.toml); the ones below come from other packages calling each other."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread makes the whole take half as long again
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # as in a stage: TRL reports each trainer that is made

THIRD_PARTY_WARNINGS = (
    # PEFT asks transformers for a property by its old name:
    # https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # TRL turns recomputation on, under the old name, so under that it is turned off; transformers has a new one:
    # https://github.com/huggingface/trl/blob/main/trl/trainer/base_config.py
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Adds the exceptions behind the rule that they are exceptions to."""
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


_finished = itertools.count(1)


def pytest_collection_finish() -> None:
    """Spares each trainer that begins a search of all that is imported for something to free, which takes 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Spares later tests also what earlier ones have left, such as modules and reports; it made stages ten times as
    slow at the end of the suite."""
    if next(_finished) % 100 == 0:
        gc.collect()
        gc.freeze()


def pytest_sessionstart() -> None:
    """Takes Ctrl-C again where a shell started the tests in the background: ignored, it would be ignored by every
    process that a test starts and interrupts, for ten minutes each."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Stages put handlers of their own in place, which would outlive a test that runs one in this process."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SEVERAL_PROCESSES = ("distributed/", "e2e/test_engine", "e2e/test_machines", "e2e/test_notebook", "e2e/test_tracking")
"""Files whose tests start several processes that wait for one another, servers and agents among them; two such tests at
once crawl."""


def _is_of_several_processes(test: str) -> bool:
    return any(f"tests/{start}" in test for start in SEVERAL_PROCESSES)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What belongs together stays with one of the processes that ``make test`` shares the tests out to: tests of
    several processes, those on one run of a recipe, and those of a file that makes something once for all of them."""
    for item in items:
        if _is_of_several_processes(item.path.as_posix()):
            item.add_marker(pytest.mark.processes)
            item.add_marker(pytest.mark.xdist_group("processes"))
        for made_once in {"forked", "served"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(made_once))
        if _has_module_fixture(item) and not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))


def _has_module_fixture(item: pytest.Item) -> bool:
    """Whether the test uses something that is made once for its file, and so would be made in each process."""
    info = getattr(item, "_fixtureinfo", None)
    known = () if info is None else info.name2fixturedefs.values()
    return any(definitions and definitions[-1].scope == "module" for definitions in known)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """Ends the run where pytest and pytest-xdist share out the tests of a group, which makes it twice as long."""
    whole = list(filter(_is_of_several_processes, ids))
    if alone := [test for test in whole if "@processes" not in test]:
        pytest.exit(f"this pytest and pytest-xdist do not keep groups together ({alone[0]})", returncode=4)
