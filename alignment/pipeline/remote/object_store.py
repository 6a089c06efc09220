"""Objects under the prefix of a store: S3 by s3fs, and whatever else fsspec reaches in the same way.

An object appears as a whole or not at all, so a reader never sees half of one. Retries are bounded: those of botocore
for requests, those of s3fs for a stream that breaks off.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, StoreError
from alignment.core.files import disk_error

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("TokenRetrievalError", "UnauthorizedSSOTokenError"),
}
"""Classes of botocore for credentials that it cannot find or read."""
_UNREACHABLE = frozenset({"HTTPClientError", "ConnectionError", "TimeoutError", "ClientConnectorError"})
_NETWORK = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT})
_EXISTING = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
"""Codes of S3 for an object that was to be written only if there was none."""
_SECRET = re.compile(r"SECRET|TOKEN|KEY|PASSWORD")
_USER = re.compile(r"//[^/@\s]*@")
_SHORTEST_SECRET = 4
_SHOWN_CHARACTERS = 200


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns errors of a store into errors for the user. The block handles objects that do not exist, so a
    FileNotFoundError is about the bucket. Raises StoreError: it cannot be reached, does not exist, or refuses."""
    try:
        yield
    except AlignmentError:
        raise
    except Exception as error:
        explanation = _explanation(error, url)
        if explanation is None:
            raise
        raise explanation from None  # the cause may hold what must not be shown


def _explanation(error: Exception, url: str) -> StoreError | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if names & _CREDENTIALS:
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and ~/.aws"
        return StoreError(f"no credentials for this store: {scrubbed(text)}", where=url, remedy=remedy)
    if isinstance(error, PermissionError):
        remedy = "check the credentials and their permissions on this bucket: list, read, write and delete objects"
        return StoreError(f"it refused these credentials: {scrubbed(text)}", where=url, remedy=remedy)
    if isinstance(error, FileNotFoundError):
        return StoreError("there is no such bucket", where=url, remedy="create it, or correct artifacts=")
    if names & _UNREACHABLE or (isinstance(error, OSError) and error.errno in _NETWORK):
        endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
        named = f"the address in {endpoint}" if endpoint else "the network; AWS_ENDPOINT_URL names another server"
        return StoreError(f"cannot be reached: {scrubbed(text)}", where=url, remedy=f"check {named}, and try again")
    if isinstance(error, OSError | ValueError) or names & {"BotoCoreError", "ClientError"}:
        return StoreError(f"it answered: {scrubbed(text) or type(error).__name__}", where=url, remedy="try again")
    return None


def is_about_existing(error: Exception) -> bool:
    """Whether a write was refused because the object exists, or because another one writes it now."""
    response = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or response.get("Error", {}).get("Code") in _EXISTING


def scrubbed(text: str) -> str:
    """The beginning of a text, without the values of secret variables and without users in addresses."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "…")
    return _USER.sub("//…@", " ".join(text.split()))[:_SHOWN_CHARACTERS]


def refuse_secret_endpoint() -> None:
    """Refuses an address of a server that holds a user or a password, because errors would repeat it. Raises
    ConfigError: there is one."""
    for name in ENDPOINTS:
        if "@" in os.environ.get(name, ""):
            raise ConfigError(
                "the address contains a user name or a password",
                where=name,
                remedy="use only http://HOST:PORT; the credentials belong in AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY",
            )


EXTRA = "pip install 'alignment-pipeline[s3]'"
_S3 = ("s3", "s3a")
_ATTEMPTS = 4
"""Times that a request is sent, with growing pauses between them."""
_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_CHUNK = 16 << 20
"""Bytes of a part of a large upload. Four are in memory at once."""
_MOST_PARTS = 9_000
"""S3 allows 10,000 parts."""
_STREAMS = 4


class ObjectStore:
    """The objects under ``url``, by key relative to it. Threads may share it. Every method raises StoreError if the
    store cannot be reached or refuses. ``refuses_existing`` says whether ``create`` is atomic here, as
    ``check_writable`` has noticed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        with explained(self.url):
            self._files, root = _file_system(self.url)
        self._root = root.rstrip("/")
        self.refuses_existing = False

    def check(self) -> None:
        """Asks for the first object, so that a wrong address, bucket or credential is noticed."""
        with explained(self.url):
            if self._protocol in _S3:
                bucket, _, prefix = self._root.partition("/")
                self._files.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            else:
                self._files.exists(self._root)

    def check_writable(self) -> None:
        """Writes and deletes an object, and notes whether the store honours a write that must not replace one."""
        key = f"probe-{secrets.token_hex(8)}"
        with explained(self.url):
            self._files.pipe_file(self._path(key), b"first")
            try:
                self._files.pipe_file(self._path(key), b"second", mode="create")
            except (OSError, NotImplementedError) as error:
                self.refuses_existing = is_about_existing(error)
            self._files.rm_file(self._path(key))

    def read(self, key: str) -> bytes | None:
        """The content of an object, or None if there is none."""
        with explained(self.url):
            try:
                return bytes(self._files.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

    def write(self, key: str, content: bytes) -> None:
        """Writes an object, in place of an older one if there is one."""
        with explained(self.url):
            self._files.pipe_file(self._path(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Writes an object unless there is one; returns whether it did. Atomic only where the store offers that."""
        with explained(self.url):
            if not self.refuses_existing:
                if self._files.exists(self._path(key)):
                    return False
                self._files.pipe_file(self._path(key), content)
                return True
            try:
                self._files.pipe_file(self._path(key), content, mode="create")
            except OSError as error:
                if not is_about_existing(error):
                    raise
                return False
            return True

    def delete(self, key: str) -> None:
        """Deletes an object if there is one."""
        with explained(self.url):
            try:
                self._files.rm_file(self._path(key))
            except FileNotFoundError:
                return

    def sizes(self, prefix: str) -> dict[str, int]:
        """The objects whose keys begin with ``prefix/``, and their bytes."""
        with explained(self.url):
            listed = self._files.find(self._path(prefix), detail=True)
        cut = len(self._path(""))
        return {path[cut:]: int(entry["size"]) for path, entry in listed.items() if entry["type"] == "file"}

    def written(self, key: str) -> datetime | None:
        """When an object was written, by the store's clock, or None if there is none."""
        with explained(self.url):
            try:
                moment: datetime = self._files.modified(self._path(key))
            except FileNotFoundError:
                return None
            return moment

    def now(self, folder: str) -> datetime:
        """The time by the store's clock, by writing an object."""
        key = f"{folder}/clock-{secrets.token_hex(8)}"
        self.write(key, b"now")
        moment = self.written(key)
        self.delete(key)
        assert moment is not None, "it was written just now"
        return moment

    def upload(self, file: Path, key: str, on_bytes: Callable[[int], None]) -> None:
        """Writes a file as an object. ``on_bytes`` is called with numbers of bytes; what it raises ends the upload.
        Raises ArtifactError: the file is gone."""
        options: dict[str, Any] = {}
        if self._protocol in _S3 and file.exists():
            part = max(_CHUNK, -(-file.stat().st_size // _MOST_PARTS))
            options = {"chunksize": part, "max_concurrency": _STREAMS}
        with explained(self.url):
            try:
                self._files.put_file(str(file), self._path(key), callback=_listener(on_bytes), **options)
            except FileNotFoundError as error:
                if file.exists():
                    raise
                gone = "it disappeared during the upload"
                raise ArtifactError(gone, where=str(file), remedy="run it again") from error

    def download(self, key: str, file: Path) -> bool:
        """Writes an object to a file; returns whether there is one. Raises DiskError: the disk is full or cannot be
        written to."""
        with explained(self.url):
            try:
                self._files.get_file(self._path(key), str(file))
            except FileNotFoundError:
                return False
            except OSError as error:
                if (full := disk_error(error, folder=file.parent)) is not None:
                    raise full from error
                raise
        return True

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


@functools.cache
def connected(url: str) -> ObjectStore:
    """The store at ``url``, which answers. A process connects once. Raises StoreError: it does not answer, or refuses;
    ConfigError: the kind of store is not known, or its package is missing."""
    store = ObjectStore(url)
    store.check()
    return store


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if protocol not in {*fsspec.available_protocols(), *_S3}:
        message = f"stores of the kind {protocol}:// are not supported"
        raise ConfigError(message, where="artifacts", remedy="s3://BUCKET/PREFIX")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        refuse_secret_endpoint()
        retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
        times = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        options["config_kwargs"] = {"retries": retries, **times}
    try:
        return url_to_fs(url, **options)  # type: ignore[no-any-return]
    except ImportError as error:
        remedy = EXTRA if protocol in _S3 else f"install it: {error}"
        raise ConfigError(f"the package for {protocol}:// is missing", where="artifacts", remedy=remedy) from error


def _listener(on_bytes: Callable[[int], None]) -> Any:
    from fsspec.callbacks import Callback

    class Listener(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            on_bytes(inc)
            super().relative_update(inc)

    return Listener()
