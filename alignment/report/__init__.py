"""A run or a sweep as one HTML file: reads its files, draws, writes. It never imports torch and needs no network."""

from __future__ import annotations

from alignment.report.kit.render import build, main_part
from alignment.report.sweep_page.sweep_report import build_sweep

__all__ = ["build", "build_sweep", "main_part"]
