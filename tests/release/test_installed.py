"""The driver works from a wheel, in an environment with its own requirements alone and in a folder that holds nothing.
`make check-dist` installs everything and trains."""

from __future__ import annotations

import pytest

from tests.release.installed import Installed, new_environment
from tests.release.test_distributions import PROJECT, ROOT, built

DRIVER = ("hydra-core", "omegaconf", "pyyaml", "rich", "psutil", "jinja2", "markupsafe", "datasketch")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    installed = new_environment(folder)
    requirements = [text for text in PROJECT["dependencies"] if text.startswith(DRIVER)]
    assert len(requirements) == len(DRIVER)
    done = installed.pip(*requirements)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install what the driver needs: {done.stdout.strip().splitlines()[-1]}")
    done = installed.pip("--no-deps", str(built(ROOT, folder / "wheel", "wheel")))
    assert done.returncode == 0, done.stdout
    return installed


@pytest.mark.processes
def test_the_first_commands_work_without_torch_and_without_a_clone(driver: Installed) -> None:
    assert driver.where().is_relative_to(driver.folder)
    assert driver.wrong_commands() == []
    assert list(driver.work.iterdir()) == []


@pytest.mark.processes
def test_a_run_without_torch_says_what_is_missing(driver: Installed) -> None:
    done = driver.align("run", "quickstart")
    assert done.returncode == 2, done.stdout
    assert (
        "launch: stages need torch, transformers, trl, peft, accelerate, datasets, which are not installed for"
        in done.stdout
    )
    assert "Traceback" not in done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["vllm", "llama-cpp"])
def test_messages_name_commands_that_an_installed_package_has(driver: Installed, engine: str) -> None:
    code = f"from alignment.engines.engine_environment import build_command; print(build_command({engine!r}))"
    command = driver.call(driver.python, "-c", code).stdout.strip()
    assert command == f"{driver.python} -m alignment.engines.engine_environment {engine}"
    assert driver.call(*command.split(), "--help").returncode == 0
