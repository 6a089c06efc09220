"""A server that speaks the part of vLLM's API that stages use, on the CPU with NumPy alone. It answers with the weights
of the folders that it is given, so it shows whether they follow the policy. Faults can be planted. ``engine_server``
runs it in this process. ``interpreter_of`` writes a program that stages take for the interpreter of an environment with
vLLM; a server that it starts is a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.llama import Array, Llama, log_softmax

BASE = "base"
PLANTED = "TEST_ENGINE_PLANTED"
"""A variable with the faults of a server that is a process of its own, as JSON."""
COMPLETIONS = "/v1/completions"
SCRATCH = "scratch"
"""A file beside the program of ``interpreter_of``, with the temporary folder of each server that it started."""
Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Faults. Answers are sampled from q ∝ p^``power``, and their log-probabilities are those of q. With ``behind`` the
    weights before the newest answer under the name of the newest. ``dies_at`` is the number of the call for answers,
    from 1, at which the process ends; ``hangs_at`` that at which it stops answering for good. ``once`` is a file: these
    two happen only while it does not exist, and make it. Each answer waits ``pause`` seconds."""

    power: float = 1.0
    behind: bool = False
    dies_at: int = 0
    hangs_at: int = 0
    once: str = ""
    pause: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What comes in place of a reply: a status with a text, or with JSON ``content``; or the connection is dropped, or
    nothing ever comes. With ``after`` the server does what was asked first, so that only its reply is lost."""

    status: int = 500
    text: str = ""
    content: Any = None
    drops: bool = False
    hangs: bool = False
    after: bool = False


class Refused(Exception):
    """A status and why."""


@dataclass
class FakeEngine:
    """A server at work. Tests may plant a fault at any time. ``calls`` are path and body of each request. ``failing``
    gives what happens in place of a reply, from the path and how often it was called before. ``edit`` changes a reply
    to a call for answers. ``pausing`` gives the seconds before such a reply from what is asked."""

    base: Path
    key: str = ""
    planted: Planted = field(default_factory=Planted)
    failing: Callable[[str, int], Failure | None] = lambda path, number: None
    edit: Callable[[Body], Body] = lambda reply: reply
    pausing: Callable[[Body], float] = lambda body: 0.0
    url: str = ""
    calls: list[tuple[str, Body]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._calls_lock = threading.Lock()
        self.over = threading.Event()
        self.version = "default"
        base = Llama.load(self.base)
        self._models = {BASE: base}
        self._history = [base]
        self._known: dict[tuple[int, tuple[int, ...]], Array] = {}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def paths(self, path: str) -> list[Body]:
        return [body for called, body in self.calls if called == path]

    def note(self, path: str, body: Body) -> int:
        """Adds a call; how many there were of its path before."""
        with self._calls_lock:
            number = len(self.paths(path))
            self.calls.append((path, body))
            return number

    def reply(self, path: str, body: Body) -> Any:
        """What a call gives; a text where vLLM gives one. Raises Refused: vLLM would not take it."""
        with self._lock:
            match path:
                case "/health":
                    return {}
                case "/v1/models":
                    return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]}
                case "/v1/load_lora_adapter":
                    return self._load(body["lora_name"], Path(body["lora_path"]))
                case "/v1/unload_lora_adapter":
                    return self._unload(body["lora_name"])
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    return self._replace(Path(body["kwargs"]["weights_path"]))
                case "/reset_prefix_cache":
                    return {}
                case "/update_weight_version":
                    self.version = body["new_version"]
                    return {"success": True}
                case "/weight_info":
                    return {"weight_version": self.version}
                case "/v1/completions":
                    return self.edit(self._completion(body))
        raise Refused(404, "Not Found")

    def _load(self, name: str, folder: Path) -> str:
        if name in self._models:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        model = self._models[BASE].with_adapter(folder)
        self._models[name] = model
        self._history.append(model)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> str:
        if name == BASE or self._models.pop(name, None) is None:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _replace(self, folder: Path) -> Body:
        """As vLLM: a head that is not one with the embeddings has to be in the file."""
        try:
            model = self._models[BASE].with_weights(folder)
        except KeyError as missing:
            raise Refused(500, str(missing)) from missing
        self._models[BASE] = model
        self._history.append(model)
        return {"results": [None]}

    def _completion(self, body: Body) -> Body:
        if body["model"] not in self._models:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        answers = [self._answer(body, body["seed"] + index) for index in range(body["n"])]
        choices = [
            {
                "index": index,
                "text": "",
                "logprobs": {"token_logprobs": logprobs, "tokens": [f"token_id:{token}" for token in ids]},
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
            }
            for index, (ids, logprobs) in enumerate(answers)
        ]
        choices.reverse()  # their order says nothing
        return {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices}

    def _answer(self, body: Body, seed: int) -> tuple[list[int], list[float]]:
        model = self._history[-2] if self.planted.behind and len(self._history) > 1 else self._models[body["model"]]
        draws = np.random.default_rng(seed)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            logits = self._logits(model, [*body["prompt"], *ids])
            if body["temperature"] == 0:
                distribution = log_softmax(logits)
                token = int(distribution.argmax())
            else:
                distribution = log_softmax(self.planted.power * log_softmax(logits / body["temperature"]))
                token = int(draws.choice(len(distribution), p=np.exp(distribution)))
            ids.append(token)
            logprobs.append(float(distribution[token]))
        return ids, logprobs

    def _logits(self, model: Llama, ids: Sequence[int]) -> Array:
        """``[vocabulary]``, of the token after ``ids``."""
        key = (id(model), tuple(ids))
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = model.logits(ids)
        return self._known[key]


class _Handler(BaseHTTPRequestHandler):
    """The server's class has the engine."""

    engine: FakeEngine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._answer(json.loads(content or b"{}"))

    def _answer(self, body: Body) -> None:
        engine, path = self.engine, self.path
        number = engine.note(path, body)
        if path.startswith("/v1") and engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
            self._send(401, {"error": "Unauthorized"})
            return
        if path == COMPLETIONS:
            engine.over.wait(engine.planted.pause + engine.pausing(body))
            if not self._goes_on(engine.planted, number + 1):
                return
        failure = engine.failing(path, number)
        if failure is not None:
            if failure.after:
                engine.reply(path, body)
            self._fail(failure)
            return
        try:
            self._send(200, engine.reply(path, body))
        except Refused as why:
            status, text = why.args
            self._send(status, {"error": {"message": text, "code": status}})

    def _goes_on(self, planted: Planted, number: int) -> bool:
        if number not in (planted.dies_at, planted.hangs_at) or (planted.once and Path(planted.once).exists()):
            return True
        if planted.once:
            Path(planted.once).touch()
        if number == planted.dies_at:
            os._exit(3)
        self._fail(Failure(hangs=True))
        return False

    def _fail(self, failure: Failure) -> None:
        self.close_connection = failure.hangs or failure.drops
        if failure.hangs:
            self.engine.over.wait(60)
        if not self.close_connection:
            error = {"error": {"message": failure.text, "code": failure.status}}
            self._send(failure.status, error if failure.content is None else failure.content)

    def _send(self, status: int, reply: Any) -> None:
        is_text = isinstance(reply, str)
        content = (reply if is_text else json.dumps(reply)).encode()
        with suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if is_text else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Tests have their own output."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _listening(engine: FakeEngine, port: int) -> _Server:
    return _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"engine": engine}))


@contextmanager
def engine_server(base: Path, **settings: Any) -> Iterator[FakeEngine]:
    """A server with the weights in ``base``, until the block ends; what hangs is then let go."""
    engine = FakeEngine(base=base, **settings)
    server = _listening(engine, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield engine
    finally:
        engine.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def interpreter_of(folder: Path, planted: Planted | None = None) -> Path:
    """A program in ``folder`` that looks to a stage like the interpreter of an environment with vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    root = Path(__file__).parents[1]
    faults = json.dumps(asdict(planted or Planted()))
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = -I ]; then exit 0; fi\n'  # whether there is a package vllm
        f"echo \"$TMPDIR\" >> '{folder / SCRATCH}'\n"
        f"export PYTHONPATH='{root}' {PLANTED}='{faults}'\n"
        f"exec '{sys.executable}' -m tests.engine_server \"$@\"\n"
    )
    program.chmod(0o755)
    return program


def main(argv: Sequence[str]) -> None:
    """Takes vLLM's command line; what has no meaning here is passed over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args(argv)
    engine = FakeEngine(
        base=options.model, key=os.environ["VLLM_API_KEY"], planted=Planted(**json.loads(os.environ[PLANTED]))
    )
    started = time.monotonic()
    with _listening(engine, options.port) as server:
        print(f"listening after {time.monotonic() - started:.1f} s", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word not in ("-m", "vllm.entrypoints.openai.api_server")])
