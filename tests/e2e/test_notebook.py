"""The notebook of the docs runs from its first cell to its last, and an interrupted kernel lets a stage save."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import alignment
from alignment.pipeline.sources import bundled_model
from tests.e2e.conftest import Align, environment

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook.ipynb"
PACKAGES = ("nbclient", "ipykernel", "matplotlib", "pandas")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
INTERRUPT = """
import json, sys, time
from pathlib import Path
from jupyter_client.manager import start_new_kernel
recipe, overrides, work = json.loads(sys.argv[1])
manager, client = start_new_kernel(kernel_name="python3")
try:
    client.execute(f"import alignment; alignment.run({recipe!r}, {overrides!r})")
    deadline = time.monotonic() + 300
    while not list(Path(work).glob("sft-*.work/checkpoints/checkpoint-*/alignment_checkpoint.json")):
        assert time.monotonic() < deadline, client.get_iopub_msg(timeout=1)
        time.sleep(0.02)
    manager.interrupt_kernel()
    print(client.get_shell_msg(timeout=120)["content"].get("ename"))
    reply = client.execute_interactive("pass", timeout=60)
    print(reply["content"]["status"])
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def executed(code: str, *arguments: str, folder: Path) -> str:
    """What a process with this code prints; it writes no settings into the user's folders."""
    own = {
        name: str(folder / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    }
    root = str(Path(alignment.__file__).parents[1])
    variables = environment() | own | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shown(notebook: dict[str, Any], words: str) -> dict[str, Any]:
    """All outputs of the cell that holds these words, by type; text that was printed is ``printed``."""
    (cell,) = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and words in "".join(cell["source"])]
    outputs: dict[str, Any] = {}
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            outputs["printed"] = outputs.get("printed", "") + "".join(output["text"])
        else:
            outputs |= {name: "".join(data) for name, data in output["data"].items()}
    return outputs


@pytest.mark.skipif(
    not bundled_model.is_ready(bundled_model.lookup("smollm2-135m")),
    reason="no bundled model on this machine; `make model` fetches it",
)
def test_the_notebook_of_the_docs_runs(tmp_path: Path) -> None:
    target = tmp_path / "executed.ipynb"
    executed(EXECUTE, str(NOTEBOOK), str(target), folder=tmp_path)
    notebook = json.loads(target.read_text(encoding="utf-8"))
    stages = ["sft", "dpo", "evaluate", "report"]
    assert [line.split()[1:4:2] for line in shown(notebook, "planned.frame()")["text/plain"].splitlines()[1:5]] == [
        [name, "run"] for name in stages
    ]
    ran = shown(notebook, "alignment.run(")
    assert [f"{name}: done" in ran["printed"] for name in stages] == [True] * 4
    assert ran["text/plain"].endswith("done: sft done, dpo done, evaluate done, report done)")
    arms = shown(notebook, "arms_frame()")["text/plain"].splitlines()
    assert [line.split()[2] for line in arms[1:]] == ["base", "sft", "dpo"]
    assert "verdict" in shown(notebook, "differences_frame()")["text/plain"]
    assert [bool(shown(notebook, words).get("image/png")) for words in ("barh(", 'y="loss"')] == [True, True]
    again = shown(notebook, "stages.dpo.beta=0.3")["text/plain"].splitlines()
    assert [line.split()[1:3] for line in again[1:]] == [["sft", "reuse"], *([name, "run"] for name in stages[1:])]
    assert alignment.load_run(tmp_path / "runs/quickstart-smoke").state == "done"


def test_an_interrupted_kernel_lets_the_stage_save(new_align: Callable[[], Align], tmp_path: Path) -> None:
    align = new_align()
    argv = align.argv("run", "stages.sft.optim.epochs=40", "stages.sft.save_every=1")
    recipe, *overrides = argv[argv.index("run") + 1 :]
    printed = executed(INTERRUPT, json.dumps([recipe, overrides, str(align.output / "artifacts")]), folder=tmp_path)
    assert printed.split() == ["KeyboardInterrupt", "ok"], "the kernel goes on"
    run = alignment.load_run(align.output / "runs/quickstart")
    assert run.state == "interrupted"
    assert run.stages["sft"].state == "waiting"
    assert alignment.plan(recipe, overrides).stages["sft"].action is alignment.Action.resume
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if words and str(align.output) in " ".join(words)]
