"""Keeps libraries from being imported that a process cannot use, or that only others would use."""

from __future__ import annotations

import os
import sys

_BY_OTHERS = ("scipy", "mlflow", "trackio")
"""transformers imports scipy for a loss of object detection, and TRL imports trackers whether they are used or not."""
_WITH_RANKS = "deepspeed"
"""accelerate imports it for every trainer, and it needs a process group."""


def hide() -> None:
    """Makes libraries look absent to those that are imported next. This saves up to a second of a stage."""
    for name in _BY_OTHERS if "RANK" in os.environ else (*_BY_OTHERS, _WITH_RANKS):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # so importlib says that there is none


def show(*names: str) -> None:
    """Lets code that runs later import these, by default all: a user's scorer for example. DeepSpeed stays hidden."""
    for name in names or _BY_OTHERS:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
