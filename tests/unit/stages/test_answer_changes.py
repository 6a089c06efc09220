"""Whether a stage makes chosen answers less likely, and says so: planted with DPO, and mended by ``nll_weight``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig
from alignment.core.artifacts import read_manifest
from alignment.job import StageInput
from alignment.stages.registry import doubts
from alignment.training.context import StageContext
from tests.chained import FULL, Chained, config_of

LN2 = math.log(2.0)
FIRST_WORDS = [("Monday?", "Now", "Soon"), ("hall?", "Up", "Down"), ("note?", "In", "Out"), ("shop?", "Yes", "No")]


def trained(folder: Path, **settings: Any) -> dict[str, float]:
    """The metrics of DPO with a high learning rate, from a policy that gives either answer half of the time.

    The answers to a prompt share all but their first words. So the policy cannot gain much by a chosen answer, and what
    lowers the rejected one lowers both.
    """
    folder.mkdir()
    ending = "the keys are with the caretaker in the hall."
    pairs = [(prompt, f"{chosen} {ending}", f"{rejected} {ending}") for prompt, chosen, rejected in FIRST_WORDS]
    write_rows(
        folder / "sft.jsonl",
        ({"prompt": prompt, "completion": answer} for prompt, *answers in pairs for answer in answers),
    )
    write_rows(folder / "dpo.jsonl", ({"prompt": p, "chosen": chosen, "rejected": r} for p, chosen, r in pairs))
    chained = Chained(folder)
    both_likely = run_long(chained, "sft", epochs=40)
    assert both_likely["loss"] < 0.2
    return run_long(chained, "dpo", epochs=16, init="sft", **settings)


def run_long(chained: Chained, kind: str, *, epochs: int, init: str = "base", **settings: Any) -> dict[str, float]:
    """The manifest's metrics of a stage that learns from the rows of its name, with all weights."""
    file = chained.folder / f"{kind}.jsonl"
    config: Any = config_of(kind, FULL, data=DataConfig(source=str(file)), **settings)
    config = replace(config, optim=replace(config.optim, epochs=epochs))
    spec = replace(chained.spec(kind, FULL, init=init, config=config), data_path=file)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    chained.inputs[kind] = StageInput(ref=f"stage:{kind}", path=spec.artifact)
    manifest = read_manifest(spec.artifact)
    assert manifest is not None
    return dict(manifest.metrics)


def test_dpo_makes_both_answers_unlikely_and_says_so_and_nll_weight_makes_the_chosen_likely(tmp_path: Path) -> None:
    plain, with_nll = trained(tmp_path / "plain"), trained(tmp_path / "nll", nll_weight=1.0)
    assert plain["logps/chosen_change"] < -LN2
    assert plain["logps/rejected_change"] < -LN2
    assert with_nll["logps/chosen_change"] > 0.0
    (doubt,) = doubts("dpo", plain)
    assert "chosen and rejected answers both became less than half as likely" in doubt
    assert "nll_weight=1" in doubt
    assert doubts("dpo", with_nll) == []


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
