"""Reward models as scorers: a model that a stage made reads the policy's tokens, any other model reads text. An
external model has its own tokenizer and chat template. So the answer is decoded, put after its prompt, rendered with
that model's template, and scored at the last real token, which is found by length and never by a pad id. A reward model
that was exported here is scored at the end of the turn, as in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from alignment.config.model import Dtype
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.core.model_files import refuse_weights_elsewhere
from alignment.costs.recorder import WEIGHTS, memory_for, on_shadows
from alignment.data.records import Prompt
from alignment.data.tokens.rendering import prompt_and_answers, render
from alignment.data.tokens.tokenize import encode_parts
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.models.assembly.heads import AT_TURN_END
from alignment.models.assembly.load import DTYPES, products_in
from alignment.models.assembly.modules import free_unused
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import batches, scalar_scores
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.rows import by_tokens, stream
from alignment.models.kernels.nf4 import reused_norms
from alignment.rewards.scorers import Answers

_ANY_ANSWER = "Yes."


@dataclass(frozen=True, kw_only=True, slots=True)
class Computation:
    """How a model is run: its device, the dtype of its matrix products, and how many ``tokens`` at once."""

    device: torch.device
    dtype: Dtype
    tokens: int


@dataclass(eq=False)
class TokenScorer:
    """A reward model that shares the policy's tokenizer and reads its token ids unchanged."""

    model: PreTrainedModel | PeftModel
    run: Computation

    @torch.no_grad()
    def scores(self, answers: Answers) -> Tensor:
        """The score at each answer's last token."""
        with products_in(self.run.dtype, self.run.device), reused_norms(self.model):
            parts = batches(answers.prompt_ids, answers.answer_ids, tokens=self.run.tokens, device=self.run.device)
            return torch.cat([scalar_scores(self.model, part.rows) for part in parts]).float().cpu()


class TextScorer:
    """An external sequence-classification model with its own tokenizer and chat template. ``prompts`` are all rows of
    the stage's data. Each is rendered once here, so that a prompt that the template refuses is reported before anything
    is sampled."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], run: Computation, *, source: str
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._run = run
        self._source = source
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        for prompt in prompts:
            try:
                self._parts(prompt, _ANY_ANSWER)
            except DataError as error:
                raise DataError(
                    f"cannot be scored by {source}: {error.message}", where=prompt.where, remedy=error.remedy
                ) from error

    @torch.no_grad()
    def scores(self, answers: Answers) -> Tensor:
        """The score at the end of each conversation. Raises ModelError: a conversation has more tokens than the model
        has positions; RewardError: the model's template refuses a conversation."""
        rows = [self.ids(prompt, text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
        self._refuse_too_long(rows, answers)
        batches = by_tokens([len(row) for row in rows], self._run.tokens)
        with products_in(self._run.dtype, self._run.device):
            parts = (stream(rows[batch.start : batch.stop], self._run.device) for batch in batches)
            return torch.cat([scalar_scores(self._model, part) for part in parts]).float().cpu()

    def ids(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of a prompt and an answer, as the model reads the conversation. Raises RewardError: the model's
        template refuses the conversation."""
        try:
            parts = encode_parts(self._tokenizer, self._parts(prompt, text))
            return [token for part in parts for token in part]
        except DataError as error:
            raise RewardError(
                f"cannot score an answer to {prompt.where}: {error.message}", where=self._source
            ) from error

    def _parts(self, prompt: Prompt, answer: str) -> list[str]:
        """Prompt and answer, rendered with the model's own chat template. For a reward model that was exported here,
        they are two parts that end with the turn, as in its training."""
        turn = Message(role="assistant", content=_without(self._control, answer))
        if getattr(self._model.config, AT_TURN_END, False):
            return prompt_and_answers(self._tokenizer, prompt.messages, [turn], prompt.tools)
        return [render(self._tokenizer, [*prompt.messages, turn], answering=False, tools=prompt.tools)]

    def _refuse_too_long(self, rows: Sequence[Sequence[int]], answers: Answers) -> None:
        positions, lengths = positions_of(self._model.base_model), [len(row) for row in rows]
        if max(lengths) <= positions:
            return
        row = lengths.index(max(lengths))
        raise ModelError(
            f"has {positions} positions, but prompt and answer of {answers.prompts[row].where} are {lengths[row]} "
            "tokens",
            where=self._source,
            remedy="lower max_prompt_length or max_new_tokens, or use a reward model with more positions",
        )


def _without(control: Sequence[str], text: str) -> str:
    """A text without the reward model's control tokens, so that a policy cannot end its turn in that model's format."""
    before = None
    while text != before:
        before = text
        for token in control:
            text = text.replace(token, "")
    return text


def _read(folder: Path, dtype: Dtype, *, source: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports about its weights. Models that nothing uses any more are freed first."""
    free_unused()
    if on_shadows():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with memory_for(WEIGHTS):
            return AutoModelForSequenceClassification.from_config(config, dtype=DTYPES[dtype]), {"missing_keys": []}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {error}", where=source) from error
    return model, report


def load_external(folder: Path, dtype: Dtype, *, source: str) -> tuple[PreTrainedModel, Any]:
    """A plain transformers sequence-classification model with one label, and its tokenizer. Its score layer is float32.
    ``source`` names the model in errors, as the user wrote it. Raises ModelError: the folder holds no such model, the
    model has no score layer over its last token, or its tokenizer has no chat template."""
    refuse_weights_elsewhere(folder, where=source)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(
            "its tokenizer has no chat template, so its conversation format is unknown",
            where=source,
            remedy="put the template with which it was trained into its folder (chat_template.jinja)",
        )
    model, report = _read(folder, dtype, source=source)
    name = type(model).__name__
    if not hasattr(model, "score"):
        raise ModelError(
            f"{name} does not score at the last token", where=source, remedy="use a decoder with a 'score' layer"
        )
    if report["missing_keys"]:
        raise ModelError(
            f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}, which {name} has",
            where=source,
            remedy="use a folder that was saved as a sequence-classification model",
        )
    if model.config.num_labels != 1:
        raise ModelError(f"it has {model.config.num_labels} labels; a reward model has one", where=source)
    model.score.float()
    model.register_buffer("score_offset", torch.zeros(()), persistent=False)  # the offset that our own heads subtract
    use_flat_attention(model)
    return model.requires_grad_(False).eval(), tokenizer
