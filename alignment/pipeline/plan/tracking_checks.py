"""Checks of trackers that a stage would only make hours later: packages that are missing, settings that contradict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata

from alignment.config.faults import Fault
from alignment.config.rules import TRACKING_URL
from alignment.config.run import TrackingConfig

PACKAGES = {
    "wandb": ("wandb", ">=0.31,<0.32"),
    "tensorboard": ("tensorboard", ">=2.20,<3"),
    "mlflow": ("mlflow-skinny", ">=3.17,<4"),
    "trackio": ("trackio", ">=0.43,<0.44"),
}
"""The distribution that a tracker needs, and its versions, as the extra of the tracker's name has them."""
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def faults(tracking: TrackingConfig, variables: Mapping[str, str] = os.environ) -> Iterator[Fault]:
    """Faults of the chosen trackers, here and with these environment variables."""
    for name, (package, versions) in PACKAGES.items():
        if getattr(tracking, name) and not _is_installed(package):
            message = (
                f"{package} is not installed; pip install '{package}{versions}' (the extra {name!r}), or leave it out"
            )
            yield Fault(where=f"tracking.{name}", message=message)
    if tracking.mlflow:
        yield from _mlflow_faults(tracking.mlflow_url, variables)
    if tracking.trackio:
        yield from _trackio_faults(variables)


def _mlflow_faults(url: str, variables: Mapping[str, str]) -> Iterator[Fault]:
    named = variables.get("MLFLOW_TRACKING_URI", "")
    if not url and not named:
        message = "no server is named; set tracking.mlflow_url or MLFLOW_TRACKING_URI, such as http://127.0.0.1:5000"
        yield Fault(where="tracking.mlflow_url", message=message)
    if not url and not TRACKING_URL.holds(named):  # its value may hold a password, so it is not shown
        message = f"MLFLOW_TRACKING_URI is not the address of a server; allowed: {TRACKING_URL.allowed}"
        yield Fault(where="tracking.mlflow", message=message)
    user, password = (variables.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if variables.get("MLFLOW_TRACKING_TOKEN") and (user or password):
        message = "MLFLOW_TRACKING_TOKEN and MLFLOW_TRACKING_USERNAME or _PASSWORD are set; unset one of them"
        yield Fault(where="tracking.mlflow", message=message)


def _trackio_faults(variables: Mapping[str, str]) -> Iterator[Fault]:
    for name in _ELSEWHERE:
        if variables.get(name):
            message = f"{name} is set, but stages write to this machine; unset it and use trackio sync after the run"
            yield Fault(where="tracking.trackio", message=message)
    if variables.get("TRACKIO_STORAGE_MODE", "").strip().lower() == "jsonl":
        message = "TRACKIO_STORAGE_MODE=jsonl cannot be read back when a stage is resumed; unset it, or use sqlite"
        yield Fault(where="tracking.trackio", message=message)


def _is_installed(package: str) -> bool:
    """Whether the distribution is there; a folder called wandb would pass for the module."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
