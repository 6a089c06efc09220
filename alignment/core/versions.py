"""The versions of the packages that a result was made with."""

from __future__ import annotations

import importlib.metadata
import sys

PACKAGES = ("alignment-pipeline", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    installed = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # our own, when it runs from a folder
            installed[package] = "not installed"
    return installed
