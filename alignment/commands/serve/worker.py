"""``python -m alignment.commands.serve.worker SETTINGS.json PORT``, which ``align serve`` calls.

It serves policies with transformers, or writes the files that vLLM loads and ends. An error is written beside the
settings for the driver.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alignment.commands.serve.loaded_arms import load_arms
from alignment.commands.serve.vllm_layout import VllmFiles
from alignment.commands.shared.stored_policy import StoredPolicy, write_error
from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.core.errors import AlignmentError
from alignment.core.files import explained


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    file, port = sys.argv[1:] if arguments is None else arguments
    folder = Path(file).parent
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    policies = [StoredPolicy(**policy) for policy in settings["policies"]]
    silence_libraries()
    try:
        if settings["engine"] == "vllm":
            from alignment.commands.serve.loaded_arms import write_files

            with explained(folder):
                write_files(policies, VllmFiles(folder=folder))
        else:
            from alignment.commands.serve.transformers_app import serve

            serve(load_arms(policies), int(port))
    except AlignmentError as error:
        with suppress(OSError):  # the driver shows what is in the log
            write_error(folder / "error.json", error)
        raise
    return 0


if __name__ == "__main__":
    run_as_program(main)
