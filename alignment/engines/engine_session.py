"""An engine for the time of a stage: started or found, given weights, asked, and started again if it dies."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from alignment.config.launch import SamplingConfig
from alignment.core.errors import ConfigError, StageError
from alignment.engines.completions import Asked, CallFailed, EngineAnswer, EngineClient, Generation
from alignment.engines.engine_environment import engines_folder, interpreter
from alignment.engines.server_process import BASE, Keeper, ServerCommand, ServerProcess, VllmOptions, vllm_command
from alignment.evaluation.endpoint_client import api_key

log = logging.getLogger(__name__)
T = TypeVar("T")

RESTARTS = 2
"""How often a server that ended is started again in one stage."""
_GOODBYE_SECONDS = 5.0
"""How long the end of a stage waits for a server at a ``url`` to forget its weights."""
_ENDING_SECONDS = 3.0
"""How long after a call that failed a server may be found to have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights that the engine answers with: the adapter in ``folder``, or a whole model if ``whole``. ``name`` is
    unique (``EngineSession.named``). Without a ``folder`` they are those that the engine was started with."""

    name: str = BASE
    folder: Path | None = None
    whole: bool = False


class EngineSession:
    """One engine, for one process that starts it; others of the stage only ask (``join``). ``where`` is the setting.
    ``log`` is the file for the server's output; without one the session has its own, which stays only if the engine
    failed. ``waiting`` is called now and then while it starts or answers, so that the stage does not count as stuck.
    ``on_peak`` receives the peak memory of each server that the session started, before it ends or replaces it.
    ``folder`` is for weights, and is removed at the end."""

    def __init__(
        self,
        config: SamplingConfig,
        *,
        where: str,
        log: Path | None = None,
        waiting: Callable[[], None] = lambda: None,
        on_peak: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._where = where
        self._id = secrets.token_hex(4)
        self._given_log = log
        self._saved_log = log or engines_folder() / f"server-{self._id}.log"
        self._waiting = waiting
        self._on_peak = on_peak
        self._keeper: Keeper | None = None
        self._server: ServerProcess | None = None
        self._client: EngineClient | None = None
        self._options: VllmOptions | None = None
        self._weights = Weights()
        self._restarts = RESTARTS
        self._failed = False

    def named(self, name: str) -> str:
        """A name for weights that no other session gives, because several stages may use one server at a ``url``."""
        return f"{name}-{self._id}"

    @property
    def folder(self) -> Path:
        return self._own_keeper().folder

    @property
    def address(self) -> tuple[str, str]:
        """Its address and key, for other processes of the stage."""
        if self._server is not None:
            return self._server.url, self._server.key
        return (self._config.url or "").removesuffix("/").removesuffix("/v1"), self._key()

    def start(self, options: VllmOptions) -> None:
        """Starts the server, or finds the one at ``url``. Raises ConfigError: there is no environment with vLLM;
        StageError: the server cannot be started, or does not answer."""
        self._options = options
        self._weights = Weights()
        if self._config.url is None:
            python = interpreter(self._config.python, package="vllm", where=f"{self._where}.python")
            self._measure()
            self._server = self._started(vllm_command(python, self._config, options))
        self.join(self.address)
        self._refuse_other_server()

    def join(self, address: tuple[str, str]) -> None:
        """Asks the server at an address from here on."""
        url, key = address
        if self._client is not None:
            self._client.close()
        self._client = EngineClient(self._config, url, key, where=self._where)

    def use(self, weights: Weights) -> None:
        """Answers with these weights from here on. Raises StageError: the server does not take them."""
        self._try(lambda: self._load(weights))
        before, self._weights = self._weights, weights
        if before.folder is not None and not before.whole:
            self._try(lambda: self._forget(before))

    def answers(
        self,
        weights: Weights,
        asked: Sequence[Asked],
        generation: Generation,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[EngineAnswer]]:
        """The answers to each prompt by these weights, which ``use`` was given; ``progress`` receives the number of
        answers in each reply. Raises StageError: the server failed, or an answer is of other weights or not what was
        asked for."""

        def replied(number: int) -> None:
            self._waiting()
            progress(number)

        def ask() -> list[list[EngineAnswer]]:
            self._refuse_other_version(weights)
            name = BASE if weights.whole else weights.name
            answers = self._asked().answers(name, asked, generation, replied, self._waiting)
            self._refuse_other_version(weights)
            return answers

        return self._try(ask)

    def stream(self, weights: Weights, asked: Asked, generation: Generation, on_token: Callable[[int], None]) -> None:
        """Calls ``on_token`` with each token of one answer by these weights as it arrives. Raises StageError: the
        server failed, or other weights answer."""
        try:
            self._asked().stream(weights.name, asked, generation, on_token)
        except CallFailed as error:  # not asked again: some tokens have been passed on
            raise self._failure(error) from error

    def close(self) -> None:
        """Ends the server and removes the folder; a server at ``url`` that still answers forgets the adapter."""
        if self._server is None and not self._failed and self._weights.folder is not None and not self._weights.whole:
            self._asked().limit(_GOODBYE_SECONDS)
            with suppress(CallFailed):
                self._forget(self._weights)
        self._measure()
        self._server = None  # so that a call of another thread, which now fails, does not start it again
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = None
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _measure(self) -> None:
        if self._keeper is not None and (peak := self._keeper.peak_memory()) is not None:
            self._on_peak(peak)

    def _own_keeper(self) -> Keeper:
        if self._keeper is None:
            self._keeper = Keeper()
        return self._keeper

    def _started(self, command: ServerCommand) -> ServerProcess:
        if self._given_log is not None:
            self._given_log.parent.mkdir(parents=True, exist_ok=True)
        try:
            return ServerProcess(
                self._own_keeper(),
                command,
                log=self._log,
                where=self._where,
                start_timeout=self._config.start_timeout,
                waiting=self._waiting,
                look=f"read {self._saved_log}",
            )
        except StageError:
            self._fail()
            raise

    @property
    def _log(self) -> Path:
        """The file that the server writes; one of its own is removed with the folder, however this process ends."""
        return self._given_log or self._own_keeper().folder / "server.log"

    def _fail(self) -> None:
        self._failed = True
        if self._given_log is None and self._keeper is not None and self._log.is_file():
            self._saved_log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._log, self._saved_log)

    def _asked(self) -> EngineClient:
        assert self._client is not None, "a session is started or joined first"
        return self._client

    def _load(self, weights: Weights) -> None:
        if weights.folder is None:
            return
        if weights.whole:
            self._asked().replace_weights(weights.folder, weights.name)
            return
        try:
            self._asked().load_adapter(weights.name, weights.folder)
        except CallFailed:
            if weights.name not in self._asked().models():  # a reply that was lost, and a retry that it refused
                raise

    def _forget(self, weights: Weights) -> None:
        """A server that was started again meanwhile does not have them."""
        if weights.name in self._asked().models():
            self._asked().unload_adapter(weights.name)

    def _refuse_other_version(self, weights: Weights) -> None:
        """An adapter's answers have its name; a whole model's have none, so the server is asked for the version."""
        if not weights.whole:
            return
        version = self._asked().weights_version()
        if version != weights.name:
            raise StageError(
                f"the engine answers with the weights {version!r} instead of {weights.name!r}",
                where=self._where,
                remedy="its answers were not used for training; let no other program use this server",
            )

    def _refuse_other_server(self) -> None:
        names = self._try(lambda: self._asked().models())
        if BASE not in names:
            raise ConfigError(
                f"the server at {self.address[0]} has no model {BASE!r}; it has {', '.join(map(repr, names))}",
                where=f"{self._where}.url",
                remedy=f"start it with --served-model-name {BASE}, as described in docs/engines.md",
            )

    def _try(self, call: Callable[[], T]) -> T:
        """Calls; starts a server that ended again, with the weights that it had. Raises StageError: a call failed
        although the server runs, or it ended too often."""
        while True:
            try:
                return call()
            except CallFailed as error:
                if not self._restarts or not self._has_ended():
                    raise self._failure(error) from error
                self._start_again()

    def _has_ended(self) -> bool:
        """Whether a server of the stage ended. The connection breaks before that can be seen."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while (server := self._server) is not None and time.monotonic() < deadline:
            if server.has_ended:
                return True
            time.sleep(0.05)
        return False

    def _failure(self, error: CallFailed) -> StageError:
        self._fail()
        if self._has_ended():
            assert self._server is not None, "it ended"
            return self._server.failure()
        log_file = f"its log is {self._saved_log}; " if self._server is not None else ""
        return StageError(
            f"a call to the engine at {self.address[0]} failed: {error}",
            where=self._where,
            remedy=f"check that it is up, and give it more time ({self._where}.timeout) if it is slow; {log_file}"
            "then run again; the stage continues from its checkpoint",
        )

    def _start_again(self) -> None:
        assert self._server is not None, "it was started"
        assert self._options is not None, "it was started"
        log.warning("%s; it will be started again.", self._server.failure().message)
        self._restarts -= 1
        weights, options = self._weights, self._options
        self.start(options)
        self._try(lambda: self._load(weights))
        self._weights = weights

    def _key(self) -> str:
        return api_key(self._config.api_key_env, where=f"{self._where}.api_key_env")
