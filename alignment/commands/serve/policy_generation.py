"""Generation behind the endpoints of ``transformers serve``, within the context of the policy that answers."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import GenerateManager, GenerationState

from alignment.commands.serve.request_checks import refusal
from alignment.commands.serve.stop_texts import CutQueue, before_stops
from alignment.models.assembly.prefix import positions_of


class PolicyGeneration(GenerateManager):
    """Answers up to the end of the context, or to a stop, which is not part of the answer."""

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[Any, Any]:
        """A queue of pieces, and the streamer that counts their tokens.

        Raises:
            HTTPException: status 400, the prompt leaves no room for an answer.
        """
        _limit(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        return CutQueue(queue, gen_config.stop_strings or []), streamer

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        """The answer without control tokens, the number of the prompt's tokens, and the tokens of the answer.

        Raises:
            HTTPException: status 400, the prompt leaves no room for an answer.
        """
        _limit(model, inputs, gen_config)
        text, prompt_tokens, ids = await super().generate_non_streaming(
            model, processor, inputs, gen_config, request_id
        )
        return before_stops(text, gen_config.stop_strings or []), prompt_tokens, ids


def _limit(model: PreTrainedModel, inputs: Any, config: GenerationConfig) -> None:
    tokens, positions = inputs["input_ids"].shape[-1], positions_of(model.base_model)
    if tokens >= positions:
        raise refusal(
            f"the prompt has {tokens} tokens and the context of this policy {positions}, which leaves no room for an"
            " answer; shorten the conversation"
        )
    config.max_new_tokens = min(config.max_new_tokens, positions - tokens)


class PolicyState(GenerationState):
    """One generation, with its own thread, for each policy."""

    def __init__(self) -> None:
        super().__init__()
        self._by_policy: dict[str, PolicyGeneration] = {}

    def get_manager(self, model_id: str, use_cb: bool = False) -> PolicyGeneration:
        """The generation of a policy."""
        if model_id not in self._by_policy:
            self._by_policy[model_id] = PolicyGeneration()
        return self._by_policy[model_id]
