"""``align export --as vllm``: a vLLM server loads what was written, and answers as the policy does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export
from tests.served import ServedRun, served_run

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return served_run(tmp_path_factory.mktemp("exported"))


def test_the_written_folder_is_served(tmp_path: Path, run: ServedRun, vllm_python: Path) -> None:
    policy = run.lineage("dpo")
    artifact = policy.adapters[-1].path.parent.parent
    options = ExportOptions(form="vllm", engine_python=str(vllm_python))
    notes = export(artifact, run.base, tmp_path / "out", options)
    match = re.search(r"loaded by vLLM, (\d+) of 8 greedy answers .* differ by (\S+) nats", notes)
    assert match is not None, notes
    assert int(match[1]) == 8
    assert float(match[2]) < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "vllm serve ." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
