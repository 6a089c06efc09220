"""The app of ``transformers serve``, restricted to policies that are loaded, each under its own name.

By itself the app loads any model that a client names, from any folder of this machine or from the hub's cache. Here the
part of it that loads models only hands out those that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler

from alignment.commands.serve.answer_form import set_answer_form
from alignment.commands.serve.loaded_arms import LoadedArm
from alignment.commands.serve.policy_generation import PolicyState
from alignment.commands.serve.policy_handlers import PolicyChat, PolicyCompletions, PolicyResponses
from alignment.commands.shared.guarded_app import HOSTS
from alignment.engines.server_process import HOST

_NEVER = -1
"""As a timeout: models stay."""


class ServedArms(ModelManager):
    """Hands out these models by name, and refuses every other name."""

    def __init__(self, arms: Sequence[LoadedArm]) -> None:
        super().__init__(model_timeout=_NEVER)
        for arm in arms:
            set_answer_form(arm.tokenizer, arm.model, arm.model.generation_config.eos_token_id)
        self.loaded_models = {
            arm.name: TimedModel(arm.model, timeout_seconds=_NEVER, processor=arm.tokenizer) for arm in arms
        }

    def process_model_name(self, model_id: str) -> str:
        """The name itself.

        Raises:
            HTTPException: status 404, there is no such model.
        """
        if model_id not in self.loaded_models:
            names = ", ".join(self.loaded_models)
            raise HTTPException(status_code=404, detail=f"there is no model {model_id!r} here, only: {names}")
        return model_id

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Any = None,
        tqdm_class: Any = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """The model and the tokenizer of a name.

        Raises:
            HTTPException: status 404, there is no such model.
        """
        name = model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}"
        return super().load_model_and_processor(self.process_model_name(name), progress_callback, tqdm_class)

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The names, as ``/v1/models`` lists them."""
        return [{"id": name, "object": "model", "created": 0, "owned_by": "alignment"} for name in self.loaded_models]

    def shutdown(self) -> None:
        """Does nothing: the endpoint ``/reset`` would unload models for good, and they end with their process."""


def application(arms: Sequence[LoadedArm]) -> Any:
    """The ASGI app. Its errors have OpenAI's form, so that clients show their text."""
    manager, state = ServedArms(arms), PolicyState()
    app = build_server(
        manager,
        PolicyChat(manager, state),
        completion_handler=PolicyCompletions(manager, state),
        response_handler=PolicyResponses(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    app.add_exception_handler(HTTPException, _refusal)
    # A web page that points its own name at 127.0.0.1 is refused by that name.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return app


async def _refusal(_: Request, error: Any) -> JSONResponse:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    body = {"message": str(error.detail), "type": kind, "code": error.status_code}
    return JSONResponse({"error": body}, status_code=error.status_code)


def serve(arms: Sequence[LoadedArm], port: int) -> None:
    """Answers requests until the process is asked to end."""
    uvicorn.run(application(arms), host=HOST, port=port, log_level="warning", access_log=False)
