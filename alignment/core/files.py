"""Reads and writes files so that nothing half-written is left, finds shipped ones, and the working folder."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.core.errors import AlignmentError, ConfigError, DataError, DiskError

_DISK = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit on file sizes allows",
    errno.EROFS: "the file system is read-only",
}
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
}
"""The system's messages, as C++ libraries quote them."""
_TOO_LARGE = "file too large"
"""Also a message of the system, but a server says the same of a request that is too large."""
_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers report an error of the system."""
_OF_TORCH = re.compile("pytorchstreamwriter failed writing|inline_container.*unexpected pos")
"""How torch.save reports a write that failed, for whatever reason."""
_PATHS = {
    errno.ENAMETOOLONG: "the path is longer than the file system allows",
    errno.ELOOP: "the path is a loop of symbolic links",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
_LABEL_CHARACTERS = 120
_LEFTOVER_SECONDS = 24 * 3600
"""A temporary file this old belongs to a process that was killed; files are written in seconds."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write to. The file replaces ``path`` when the block ends, and is
    removed when the block fails. If ``durable``, its bytes are on the disk before it replaces ``path``. Several
    processes may do so at the same time, also from machines that share the folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path):
            yield temporary
            if durable:
                flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts ``path`` into the error of a failed write; the system's error names no file, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(".tmp"):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes UTF-8 and replaces ``path`` in one rename."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path, *, shared: bool = False) -> None:
    """Removes temporary files that a killed process left in a folder. Only those older than a day if other processes
    may be writing now (``shared``)."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):
            if not shared or time.time() - file.stat().st_mtime > _LEFTOVER_SECONDS:
                file.unlink()


def disk_error(error: BaseException, *, folder: Path) -> DiskError | None:
    """The error to show the user if the disk caused ``error`` or one that led to it, else None. ``folder`` is where the
    block was writing; the error may name the exact file."""
    for cause in _chain(error):
        number = _number(cause)
        if number is not None:
            named = cause.filename if isinstance(cause, OSError) else None
            where = Path(named) if isinstance(named, str) else folder
            return DiskError(f"{_DISK[number]}{_room(number, where)}", where=str(where), remedy=_remedy(number))
    return None


def path_error(error: OSError) -> ConfigError | None:
    """The error to show the user if a path cannot be used as it is, else None."""
    if error.errno not in _PATHS or not error.filename:  # without a file name, a socket or a process was refused
        return None
    name = str(error.filename)
    label = name if len(name) <= _LABEL_CHARACTERS else f"{name[:_LABEL_CHARACTERS]}… ({len(name)} characters)"
    return ConfigError(_PATHS[error.errno], where=label, remedy="name another path, or change its permissions")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into errors for the user; ``folder`` is where the block writes. Raises DiskError:
    the file system cannot be written to; ConfigError: a path cannot be used."""
    try:
        yield
    except AlignmentError:
        raise
    except Exception as error:
        explanation = disk_error(error, folder=folder) or (path_error(error) if isinstance(error, OSError) else None)
        if explanation is None:
            raise
        raise explanation from error


def is_full(folder: Path, *, least: int = 1 << 16) -> bool:
    """Whether fewer than ``least`` bytes can still be written there."""
    return shutil.disk_usage(_existing(folder)).free < least


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _DISK else None
    words = str(error).lower()
    if quoted := _OF_RUST.search(words):
        return int(quoted[1]) if int(quoted[1]) in _DISK else None
    if isinstance(error, OSError) and _TOO_LARGE in words:
        return errno.EFBIG
    if isinstance(error, RuntimeError) and _OF_TORCH.search(words):
        return errno.ENOSPC
    quotes = isinstance(error, OSError | RuntimeError)
    return next((number for text, number in _WORDS.items() if quotes and text in words), None)


def _room(number: int, where: Path) -> str:
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return "" if limit == resource.RLIM_INFINITY else f", {in_units(limit)} (ulimit -f)"
    if number == errno.EROFS:
        return ""
    return f"; {in_units(shutil.disk_usage(_existing(where)).free)} are free"


def _remedy(number: int) -> str:
    again = "and run again: nothing is lost, a stage continues from its last checkpoint"
    if number == errno.EFBIG:
        return f"raise the limit (ulimit -f unlimited) {again}"
    if number == errno.EROFS:
        return f"make it writable {again}; output=FOLDER writes to another folder"
    return f"free space {again}"


def in_units(number: int) -> str:
    """``512 bytes``, ``1.5 MB``: decimal units, as disks are sold."""
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if units[0] != "bytes" else f"{number} bytes"


def _existing(path: Path) -> Path:
    return next((candidate for candidate in (path, *path.parents) if candidate.exists()), Path("/"))


def cut_unfinished_line(path: Path) -> bool:
    """Removes half a line that a killed writer or a full disk left at the end. Returns whether there was one. Raises
    OSError: the file cannot be written to."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
        flush(path)
    return len(whole) < len(content)


def flush(path: Path) -> None:
    """Forces the bytes of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError: it is not JSON, or its lists and objects are nested more deeply than
    can be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deeply") from error


def partial_folder(target: Path) -> Path:
    """Where a command writes a new folder, which is renamed when it is complete."""
    return target.with_name(f".{target.name}.partial")


def can_be_a_file(path: Path) -> bool:
    """Whether a file can be made there, or replace one; a device such as ``/dev/null`` must stay what it is."""
    return path.is_file() or (not path.exists() and path.absolute().parent.is_dir())


def new_folder(to: str, *, option: str = "--to") -> Path:
    """The folder that a command writes, which does not exist yet; ``option`` names it on the command line. Raises
    ConfigError: it exists already, or its parent folder does not."""
    target = Path(to).expanduser().absolute()
    if target.exists() or not target.parent.is_dir():
        why = "exists already" if target.exists() else "is in a folder that does not exist"
        raise ConfigError(f"{to!r} {why}", where=option, remedy="name a new folder inside one that exists")
    return target


MOST_BYTES = 1 << 20


def refuse_endless(path: Path) -> None:
    """Accepts a regular file, a link to one, or a path that does not exist. Raises DataError: the path is a pipe, a
    socket or a device, which may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise DataError(
            "is not a regular file", where=str(path), remedy="copy its content to a regular file and name that one"
        )


def small_text(path: Path) -> str:
    """The text of the file. Raises OSError, UnicodeDecodeError: it cannot be read; DataError: it is not a regular file,
    or is too large."""
    refuse_endless(path)
    with path.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise DataError(f"is longer than {MOST_BYTES >> 20} MiB", where=str(path), remedy="is it the right file?")
    return content.decode()


def current_folder() -> Path:
    """The current folder. Raises ConfigError: it was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder no longer exists", remedy="change to a folder that exists") from None


_PACKAGE = Path(__file__).resolve().parents[1]
CODE_ROOT = _PACKAGE.parent
"""The folder that ``alignment`` is imported from: the checkout, or where packages are installed."""
_COPIES = _PACKAGE / "_shipped"


def shipped(name: str) -> Path:
    """The folder ``conf``, ``launch``, ``recipes`` or ``data``."""
    return _COPIES / name if _COPIES.is_dir() else CODE_ROOT / name


def command_for(target: str, module: str, *arguments: str) -> str:
    """What a message advises: the target of make in a checkout, and the module it calls in an installed package."""
    if not _COPIES.is_dir():
        return f"make {target}"
    return " ".join([sys.executable, "-m", module, *arguments])
