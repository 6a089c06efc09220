"""Which versions of what a result was made with."""

from __future__ import annotations

import importlib.metadata
import sys

PACKAGES = ("alignment-pipeline", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of Python and the packages that a result may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # our own, when it runs from a folder
            found[package] = "not installed"
    return found
