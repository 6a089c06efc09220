"""The versions of the packages that a result was made with."""

from __future__ import annotations

import importlib.metadata
import sys

TRAINING_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""What a stage imports and the driver does not."""
PACKAGES = ("alignment-pipeline", *TRAINING_LIBRARIES)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    installed = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # our own, when it runs from a folder
            installed[package] = "not installed"
    return installed
