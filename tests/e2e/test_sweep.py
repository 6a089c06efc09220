"""A sweep as a user calls it: what no setting reaches is made once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alignment.core.locks import is_held
from tests.e2e.conftest import SMALL, Align, environment
from tests.living import wait_until


def test_only_what_a_setting_reaches_is_made_for_each_value(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    align = new_forked()
    file = tmp_path / "betas.yaml"
    file.write_text(
        "objective: {arm: 'stage:dpo'}\nparameters: [{key: stages.dpo.beta, values: [0.1, 0.3]}]\n", encoding="utf-8"
    )
    assert align.forked is not None
    argv = align.argv("sweep")
    verb = argv.index("sweep")
    code, printed = align.forked.run([*argv[verb : verb + 2], str(file), *argv[verb + 2 :]])
    assert code == 0, printed
    assert re.search("^(best|tied): stages.dpo.beta=", printed, re.MULTILINE)
    made = [json.loads(path.read_text())["stage"] for path in align.output.glob("artifacts/*/manifest.json")]
    assert {stage: made.count(stage) for stage in set(made)} == {
        "sft": 1,
        "reward": 1,
        "ppo": 1,
        "dpo": 2,
        "evaluate": 2,
        "report": 2,
    }
    folder = align.output / "sweeps/quickstart.betas"
    record = json.loads((folder / "sweep.json").read_text())
    rows = record["trials"]
    assert {tuple(row["words"]) for row in rows} == {("stages.dpo.beta=0.1",), ("stages.dpo.beta=0.3",)}
    for row in rows:
        assert row["figures"][0]["low"] <= row["figures"][0]["mean"] <= row["figures"][0]["high"]
        assert (folder / row["report"]).is_file()
        assert row["report"] in (folder / "sweep.html").read_text()
    assert list(record["goals"][0]["shared_arms"]) == ["base", "base+prompt", "sft", "ppo"]


RECIPE = """\
defaults: [base, stage@stages.sft: sft, stage@stages.dpo: dpo, _self_]
summary: two stages
stages:
  sft: {data: {source: "bundled:quickstart/conversations"}}
  dpo: {data: {source: "bundled:quickstart/preferences"}}
"""
BY_ITS_OWN_FIGURE = """\
objective: {stage: dpo, metric: rewards/accuracies}
parameters: [{key: stages.dpo.beta, values: [0.1, 0.3]}]
"""


def test_two_at_once_share_a_stage_survive_a_kill_of_the_sweep_and_go_on(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    for name, text in (("two.yaml", RECIPE), ("betas.yaml", BY_ITS_OWN_FIGURE)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    small = [setting for setting in SMALL if setting.startswith(("launch.", "model.", "stages.sft", "stages.dpo"))]
    overrides = [f"output={tmp_path}", f"model.source=path:{tiny_model_folder}", *small]
    argv = [sys.executable, "-m", "alignment.cli", "sweep", "./two.yaml", "./betas.yaml", "--at-once", "2", *overrides]

    killed = subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: any(tmp_path.glob("artifacts/sft-*.work/progress.json")))
    killed.kill()
    killed.wait()
    runs = [tmp_path / f"runs/two.betas.{number}" for number in (0, 1)]
    wait_until(
        lambda: not any(is_held(lock) for lock in [*tmp_path.glob("artifacts/*/lock"), *(r / "lock" for r in runs)])
    )

    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best: stages.dpo.beta=" in done.stdout or "tied: stages.dpo.beta=" in done.stdout
    made = [json.loads(path.read_text())["stage"] for path in tmp_path.glob("artifacts/*/manifest.json")]
    assert sorted(made) == ["dpo", "dpo", "sft"]
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        assert record["state"] == "done"
        assert {stage["state"] for stage in record["stages"].values()} <= {"done", "reused"}
    assert list(tmp_path.glob("artifacts/*.work")) == []
