"""Keeps libraries from being imported that a process cannot use."""

from __future__ import annotations

import os
import sys


def hide_deepspeed() -> None:
    """Makes DeepSpeed look absent to a process without a process group, which it needs.

    Where it is installed, accelerate imports it in every stage, whatever the stage does. Call this before the imports.
    """
    if "RANK" not in os.environ:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # so importlib says that there is none
