"""Errors of a store are in words, and without credentials."""

from __future__ import annotations

import errno

import pytest

from alignment.core.errors import AlignmentError, ConfigError, StoreError
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.pipeline.remote.store_errors import explained, refuse_secret_endpoint


class EndpointConnectionError(ConnectionError):
    """As botocore names it."""


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("denied"), "it refused these credentials: denied"),
        (NoCredentialsError("none"), "no credentials for this store: none"),
        (FileNotFoundError("x"), "there is no such bucket"),
        (EndpointConnectionError("http://a"), "cannot be reached: http://a"),
        (OSError(errno.ECONNREFUSED, "refused"), "cannot be reached"),
        (OSError(errno.EBUSY, "slow down"), "it answered: [Errno 16] slow down"),
    ],
)
def test_each_kind_has_its_words(error: Exception, expected: str) -> None:
    with pytest.raises(StoreError, match="s3://b/p") as refused, explained("s3://b/p"):
        raise error
    assert expected in str(refused.value)
    assert refused.value.exit_code == 11
    assert refused.value.labelled.startswith("store: ")


def test_a_bug_and_an_error_for_the_user_stay_what_they_are() -> None:
    for error in (KeyError("x"), ConfigError("y")):
        with pytest.raises(type(error)), explained("s3://b/p"):
            raise error


def test_credentials_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    with pytest.raises(StoreError) as refused, explained("s3://b/p"):
        raise OSError("http://user:pass@host/x" + " hunter2hunter2" * 100)
    assert "hun" not in str(refused.value), "not even its beginning, where the text is cut"
    assert "user" not in str(refused.value)
    assert refused.value.__cause__ is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@host")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: the address contains a user name or a password"):
        refuse_secret_endpoint()


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(AlignmentError, match="stores of the kind ftpx:// are not supported"):
        ObjectStore("ftpx://bucket/prefix")
