"""All stages on the CUDA device that torch finds, in one process: ``python -m tests.simulated_device.on_card``. Prints
a line for each; ``--only sft`` runs those whose names hold the text. Exit code: 0, or 1 if one failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.simulated_device.stages import Cell, all_cells, run_stage


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names")
    options = parser.parse_args(argv)
    chosen = [cell for cell in all_cells() if options.only in str(cell)]
    faults = {str(cell): fault for cell in chosen if (fault := _fault(cell))}
    for name, fault in faults.items():
        print(f"FAILED {name}: {fault}")
    return int(bool(faults) or not chosen)


def _fault(cell: Cell) -> str:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_stage(cell, Path(folder))
        except Exception as error:  # noqa: BLE001  the others are tried, whatever it is
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(f"passed {cell} after {time.monotonic() - started:.1f} s", flush=True)
    return ""


if __name__ == "__main__":
    sys.exit(main())
