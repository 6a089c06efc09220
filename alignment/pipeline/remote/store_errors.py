"""What went wrong with a store, in words, without credentials."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from alignment.core.errors import AlignmentError, ConfigError, StoreError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CREDENTIALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
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
    """Turns errors of a store into errors for the user.

    The block handles objects that do not exist, so a FileNotFoundError is about the bucket.

    Raises:
        StoreError: it cannot be reached, does not exist, or refuses.
    """
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
        return StoreError(
            f"no credentials for this store: {scrubbed(text)}",
            where=url,
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and ~/.aws",
        )
    if isinstance(error, PermissionError):
        return StoreError(
            f"it refused these credentials: {scrubbed(text)}",
            where=url,
            remedy="check the credentials and their permissions on this bucket: list, read, write and delete objects",
        )
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
    """Refuses an address of a server that holds a user or a password, because errors would repeat it.

    Raises:
        ConfigError: there is one.
    """
    for name in ENDPOINTS:
        if "@" in os.environ.get(name, ""):
            raise ConfigError(
                "the address contains a user name or a password",
                where=name,
                remedy="use only http://HOST:PORT; the credentials belong in AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY",
            )
