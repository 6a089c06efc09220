"""Settings of calls to a server over HTTP, whatever it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.rules import NOT_NEGATIVE, POSITIVE, URL, VARIABLE


@dataclass(kw_only=True, slots=True)
class CallsConfig:
    """Where a server is, and how it is called.

    ``api_key_env`` names the environment variable that holds the key; the key itself is written nowhere. A call waits
    ``timeout`` seconds for the whole answer, of at most 4 MiB, and is retried ``retries`` times. Redirects are not
    followed. ``concurrency`` calls run at once.
    """

    base_url: Annotated[str, URL] = ""
    api_key_env: Annotated[str | None, VARIABLE] = field(default=None, metadata={"identity": False})
    timeout: Annotated[float, POSITIVE] = field(default=60.0, metadata={"identity": False})
    retries: Annotated[int, NOT_NEGATIVE] = field(default=2, metadata={"identity": False})
    concurrency: Annotated[int, POSITIVE] = field(default=4, metadata={"identity": False})
