"""A sweep as a user calls it: what no setting reaches is made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import Align


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
    assert "best: stages.dpo.beta=" in printed
    made = [json.loads(path.read_text())["stage"] for path in align.output.glob("artifacts/*/manifest.json")]
    assert {stage: made.count(stage) for stage in set(made)} == {
        "sft": 1,
        "reward": 1,
        "ppo": 1,
        "dpo": 2,
        "evaluate": 2,
        "report": 2,
    }
    rows = json.loads((align.output / "sweeps/quickstart.betas/sweep.json").read_text())
    assert {tuple(row["settings"]) for row in rows} == {("stages.dpo.beta=0.1",), ("stages.dpo.beta=0.3",)}
    for row in rows:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert (align.output / "runs" / row["run"] / "report.html").is_file()
