"""A run as one HTML file: reads the run's files, draws, writes. It never imports torch and needs no network."""

from __future__ import annotations

from alignment.report.render import build

__all__ = ["build"]
