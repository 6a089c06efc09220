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
            message = f"{package} is not installed; pip install '{package}{versions}' (the extra {name!r})"
            yield Fault(where=f"tracking.{name}", message=f"{message}, or leave it out")
    server = variables.get("MLFLOW_TRACKING_URI", "")
    if tracking.mlflow and not tracking.mlflow_url and not server:
        message = "no server is named; set tracking.mlflow_url or MLFLOW_TRACKING_URI, such as http://127.0.0.1:5000"
        yield Fault(where="tracking.mlflow_url", message=message)
    if tracking.mlflow and not tracking.mlflow_url and not TRACKING_URL.holds(server):  # it may hold a password
        message = f"MLFLOW_TRACKING_URI is not the address of a server; allowed: {TRACKING_URL.allowed}"
        yield Fault(where="tracking.mlflow", message=message)
    has_user = any(variables.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if tracking.mlflow and variables.get("MLFLOW_TRACKING_TOKEN") and has_user:
        message = "MLFLOW_TRACKING_TOKEN and MLFLOW_TRACKING_USERNAME or _PASSWORD are set; unset one of them"
        yield Fault(where="tracking.mlflow", message=message)
    for name in _ELSEWHERE if tracking.trackio else ():
        if variables.get(name):
            message = f"{name} is set, but stages write to this machine; unset it and use trackio sync after the run"
            yield Fault(where="tracking.trackio", message=message)
    if tracking.trackio and variables.get("TRACKIO_STORAGE_MODE", "").strip().lower() == "jsonl":
        message = "TRACKIO_STORAGE_MODE=jsonl cannot be read back when a stage is resumed; unset it, or use sqlite"
        yield Fault(where="tracking.trackio", message=message)


def _is_installed(package: str) -> bool:
    """Whether the distribution is there; a folder called wandb would pass for the module."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
