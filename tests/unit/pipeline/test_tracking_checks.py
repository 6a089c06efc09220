"""Trackers that cannot be used are refused by the plan, and no message shows a password."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from alignment.config.tracking import LABELS, TrackingConfig
from alignment.core.errors import ConfigError
from alignment.pipeline.plan import tracking_checks
from tests.unit.pipeline.conftest import MakePlan

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
ELSEWHERE = "but stages write to this machine; unset it and use trackio sync after the run"


@pytest.fixture
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_checks.metadata, "version", lambda package: "1.0")


def _absent(package: str) -> str:
    raise PackageNotFoundError(package)


def test_a_tracker_that_is_not_installed_is_refused_with_its_package_and_extra(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_checks.metadata, "version", _absent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    plan()
    with pytest.raises(ConfigError) as caught:
        plan("tracking=[wandb,tensorboard,mlflow,trackio]")
    assert set(tracking_checks.PACKAGES) == set(LABELS)
    for name, (package, versions) in tracking_checks.PACKAGES.items():
        message = f"pip install '{package}{versions}' (the extra {name!r}), or leave it out"
        assert f"tracking.{name}: {package} is not installed; {message}" in str(caught.value)
        assert f'{name} = ["{package}{versions}"]' in PROJECT.read_text(encoding="utf-8"), "as the extra has it"


@pytest.mark.usefixtures("_all_installed")
@pytest.mark.parametrize(
    ("tracker", "variables", "where", "words"),
    [
        ("mlflow", {}, "tracking.mlflow_url", "no server is named; set tracking.mlflow_url or MLFLOW_TRACKING_URI"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:///s3cret.db"}, "tracking.mlflow", "is not the address of a server"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://me:s3cret@x"}, "tracking.mlflow", "MLFLOW_TRACKING_PASSWORD)"),
        (
            "mlflow",
            {**SERVER, "MLFLOW_TRACKING_TOKEN": "s3cret", "MLFLOW_TRACKING_USERNAME": "me"},
            "tracking.mlflow",
            "unset one of them",
        ),
        ("trackio", {"TRACKIO_SPACE_ID": "s3cret/space"}, "tracking.trackio", f"TRACKIO_SPACE_ID is set, {ELSEWHERE}"),
        ("trackio", {"TRACKIO_SERVER_URL": "s3cret"}, "tracking.trackio", f"TRACKIO_SERVER_URL is set, {ELSEWHERE}"),
        ("trackio", {"TRACKIO_STORAGE_MODE": "JSONL"}, "tracking.trackio", "cannot be read back"),
    ],
)
def test_settings_that_contradict_are_refused(tracker: str, variables: dict[str, str], where: str, words: str) -> None:
    (fault,) = tracking_checks.faults(TrackingConfig(**{tracker: True}), variables)  # type: ignore[arg-type]
    assert fault.where == where
    assert words in fault.message
    assert "s3cret" not in fault.message
    assert list(tracking_checks.faults(TrackingConfig(), variables)) == [], "a tracker that is not chosen needs nothing"


@pytest.mark.usefixtures("_all_installed")
def test_what_fits_is_not_refused() -> None:
    password = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s3cret"}
    everything = TrackingConfig(wandb=True, tensorboard=True, mlflow=True, trackio=True)
    assert list(tracking_checks.faults(everything, SERVER | password)) == []
    here = TrackingConfig(mlflow=True, mlflow_url="https://mlflow.example.org/team")
    assert list(tracking_checks.faults(here, {})) == []


def test_a_password_in_the_address_is_refused_and_not_shown(plan: MakePlan) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("tracking.mlflow_url=http://me:s3cret@127.0.0.1:5000")
    assert "tracking.mlflow_url" in str(caught.value)
    assert "s3cret" not in str(caught.value)
