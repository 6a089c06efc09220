"""``align serve`` with the default engine: three policies asked by OpenAI's client, and what is left when it ends."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.commands.shared.listening import PAGE_LIBRARIES
from tests.documented.blocks import blocks
from tests.documented.commands import same_output
from tests.e2e.forked import Forked
from tests.living import wait_until, words_of
from tests.served import (
    ARMS,
    ServedRun,
    Serving,
    answers_are_ours,
    command,
    nothing_is_left_after,
    served_run,
    serving,
    the_server_takes_nothing_else,
    tools_reach_the_template,
)
from tests.tiny import BASE_SOURCE

ABSENT = [name for name in (*PAGE_LIBRARIES, "openai") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"serving needs {', '.join(ABSENT)}, not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return served_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(run: ServedRun) -> Iterator[Serving]:
    arms = [word for arm in ARMS for word in ("--arm", arm)]
    with serving(run, *arms) as process:
        yield process


def test_each_arm_answers_as_our_own_generation_and_stops_where_training_ended_answers(
    served: Serving, run: ServedRun
) -> None:
    answers_are_ours(served, run)


def test_a_system_turn_and_tools_are_rendered_by_the_template(served: Serving, run: ServedRun) -> None:
    tools_reach_the_template(served, run)


def test_no_other_model_is_loaded_whoever_asks(served: Serving, run: ServedRun) -> None:
    the_server_takes_nothing_else(served, run)


def test_it_says_what_is_served_as_the_documentation_quotes_it_and_its_curl_works(
    served: Serving, run: ServedRun
) -> None:
    assert served.printed[0] == "loading base, sft, dpo …"
    assert [line.split()[0] for line in served.printed[2:5]] == list(ARMS)
    page = Path(__file__).parents[2] / "docs/serving.md"
    (quoted,) = [block.text for block in blocks(page) if block.text.startswith("serving at ")]
    shown = "\n".join(line for line in served.printed[1:] if not line.startswith("  sft "))
    for base in (f"path:{run.base}", BASE_SOURCE):
        shown = shown.replace(base, "bundled:smollm2-135m")
    assert same_output(quoted, shown, differs=True), shown
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    done = subprocess.run(served.curl, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert '"model":"dpo"' in done.stdout


def test_nothing_is_left_when_it_is_interrupted(served: Serving) -> None:
    """The last of the tests with all three policies."""
    nothing_is_left_after(served, signal.SIGINT)


def test_nothing_is_left_when_it_is_killed(run: ServedRun) -> None:
    with serving(run) as process:
        nothing_is_left_after(process, signal.SIGKILL)


def test_the_end_of_the_server_ends_the_command_and_is_named(run: ServedRun) -> None:
    with serving(run) as process:
        processes = process.processes()
        (server,) = [child for child in processes if "alignment.commands.serve.worker" in words_of(child)]
        server.kill()
        printed, _ = process.process.communicate(timeout=60)
        assert process.process.returncode == 5
        assert "exit code -9" in printed
        wait_until(lambda: process.has_left_nothing(processes))


def test_a_fault_while_loading_has_its_exit_code(run: ServedRun, forked: Forked, tmp_path: Path) -> None:
    copy = ServedRun(output=tmp_path, artifacts=dict(run.artifacts))
    shutil.copytree(run.base, copy.base)
    (copy.base / "chat_template.jinja").unlink()
    copy.record()
    code, printed = forked.run([*command(copy, "--arm", "base", "--port", "0")[3:]])
    assert code == 3, printed
    assert "data: base: the tokenizer has no chat template" in printed
