"""What a plan of costs refuses before it starts a process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.plan import show
from alignment.core.errors import ConfigError, ModelError
from alignment.pipeline.execute import planned_costs
from alignment.records.cost import PhaseCost, RunCost, StageCost


def test_an_unknown_device_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"no device 'h1000'") as refused:
        show(Console(file=io.StringIO()), "quickstart", [], device="h1000", cost=True)
    assert "this, h200, h100" in str(refused.value)


def test_a_plan_shows_that_an_earlier_cost_sought_no_settings_for_the_memory_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "empty"))
    stage = StageCost(stage="dpo", kind="dpo", phases={"training": PhaseCost(peak=6 * 10**9)})
    earlier = RunCost(device="this", memory=4e9, stages=[stage])
    monkeypatch.setattr(planned_costs, "known", lambda _: earlier)
    screen = io.StringIO()
    show(Console(file=screen, width=200), "quickstart", [f"output={tmp_path}"])
    assert "dpo: 6.00 GB do not fit into 4.00 GB; --cost looks for settings that fit" in screen.getvalue()


def test_a_model_that_is_not_here_is_refused_with_what_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"bundled:smollm2-135m is not on this machine") as refused:
        show(Console(file=io.StringIO()), "quickstart", [f"output={tmp_path}"], cost=True)
    assert "make model" in str(refused.value)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(("asked", "where"), [({"cost": True}, "--cost"), ({"trade": True}, "--trade")])
def test_on_a_machine_with_a_gpu_the_gpu_is_to_be_named(
    asked: dict[str, bool], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match=r"this machine has a GPU, and no times are known for it") as refused:
        show(Console(file=io.StringIO()), "quickstart", [], **asked)
    assert where in str(refused.value)
    assert "--device h200" in str(refused.value)
