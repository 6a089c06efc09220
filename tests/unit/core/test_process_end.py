"""A process that has done its work ends with the exit code of that work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LATE = """
import atexit, os, sys
class Late:
    def __del__(self):
        os.abort()
late = Late()
atexit.register(lambda: print("handled", end=""))
print("printed", end=" ")
"""
"""A program that is aborted while the interpreter is taken down, as by a native thread that waits for its lock."""


def ended(program: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def test_what_happens_while_an_interpreter_is_taken_down_changes_no_exit_code() -> None:
    end = "from alignment.core.process_end import end_process\nend_process(5)\n"
    assert ended(LATE + end) == (5, "printed handled"), "exit handlers run, and output is written"
    assert ended(LATE + "sys.exit(5)\n")[0] == -6, "what it is for"


@pytest.mark.parametrize("handler", ["lambda: 1 / 0", "lambda: sys.exit(3)"])
def test_a_handler_that_fails_changes_no_exit_code(handler: str) -> None:
    program = f"import atexit, sys\nfrom alignment.core.process_end import end_process\natexit.register({handler})\n"
    assert ended(f"{program}print('written')\nend_process(0)\n") == (0, "written\n")


def test_output_that_cannot_be_written_changes_no_exit_code() -> None:
    program = "import sys\nfrom alignment.core.process_end import end_process\nsys.stdout.close()\nend_process(4)\n"
    assert ended(program)[0] == 4


def test_every_process_that_loads_the_libraries_ends_so() -> None:
    """The others load neither torch nor data sets, or, in an environment of its own, nothing of this project."""
    package = Path(__file__).parents[3] / "alignment"
    programs = {
        str(file.relative_to(package)): text
        for file in package.rglob("*.py")
        if 'if __name__ == "__main__":' in (text := file.read_text(encoding="utf-8"))
    }
    usual = {name for name, text in programs.items() if "    end_process(" not in text}
    assert usual == {
        "cli.py",
        "fork_server.py",
        "commands/export/gguf_form/llama_script.py",
        "engines/build_environment.py",
        "engines/keeper_process.py",
        "pipeline/sources/bundled_model.py",
        "pipeline/sweeps/trial.py",
    }
