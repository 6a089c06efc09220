"""Where a training stage starts: the policy that ``init`` names, and the tokenizer that it was trained with."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, TaskType
from transformers import PreTrainedModel

from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.load import Lineage, lineage, refuse_other_tokenizer
from alignment.models.assembly.start import load_start, turn_off_dropout
from alignment.training.context import StageContext


def initial_policy(context: StageContext) -> tuple[Lineage, Any]:
    """The policy's lineage and its tokenizer, with the run's chat template.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        ModelError: its base is not the run's, or it was trained with another tokenizer or chat template.
    """
    spec = context.spec
    context.progress("loading")
    init = spec.inputs["init"]
    start = lineage(spec, init)
    tokenizer = load_tokenizer(start.base, spec.model.template)
    if init.path is not None and init.path != start.base:  # a whole model brings its own
        refuse_other_tokenizer(spec, init, tokenizer)
    return start, tokenizer


def initial_model(
    context: StageContext, start: Lineage, task: TaskType, *, may_drop: bool
) -> PreTrainedModel | PeftModel:
    """The model that the stage trains, with the stage's adapter (alignment/models/assembly/start.py).

    ``may_drop`` allows dropout. A stage that compares two passes of one model must not allow it, because each pass
    would drop different values.
    """
    context.phase("loading")
    sharded = context.spec.sharding.of_weights
    model = load_start(
        start, context.adapter, context.spec.model.dtype, task=task, device=context.device, sharded=sharded
    )
    if not may_drop:
        turn_off_dropout(model)
    return model
