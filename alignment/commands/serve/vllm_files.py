"""Writes what a vLLM server loads beside weights and adapters that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.commands.serve.loaded_arms import generation_config, lineage_and_tokenizer, merged, write_sum
from alignment.commands.serve.vllm_layout import VllmFiles, vllm_layout
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.core.errors import ModelError
from alignment.data.templates import reads_tools
from alignment.data.tokens.tokenize import end_ids
from alignment.data.tokens.tokenizer import tokenizer_hashes

_REFUSE_TOOLS = (
    "{%- if tools %}{{- raise_exception('tools: the chat template of this policy has no place for them') }}"
    "{%- endif %}\n"
)


def write_files(policies: Sequence[StoredPolicy], files: VllmFiles) -> None:
    """Writes the tokenizer, the generation config, merged weights of a single policy, and sums of adapters.

    Raises:
        ConfigError: several policies cannot be served together.
        ModelError: they have different tokenizers, templates or ends of answers.
        ArtifactError, ModelError, DataError: as ``load_arms``."""
    layout = vllm_layout(policies)
    loaded = [lineage_and_tokenizer(policy) for policy in policies]
    lineage, tokenizer = loaded[0]
    for policy, (_, other) in zip(policies[1:], loaded[1:], strict=True):
        _refuse_other_tokenizer(policies[0], tokenizer, policy, other)
    if layout.weights is None:
        merged(lineage, tokenizer, policies[0].dtype).save_pretrained(str(files.merged))
    for arm in layout.arms:
        if len(arm.folders) > 1:
            write_sum(arm.folders, files.adapter(arm))
    if not reads_tools(tokenizer.chat_template):
        own = tokenizer.chat_template  # refuses the tools that it would leave out; vLLM passes the reason on
        tokenizer.chat_template = (
            _REFUSE_TOOLS + own if isinstance(own, str) else {name: _REFUSE_TOOLS + text for name, text in own.items()}
        )
    tokenizer.save_pretrained(str(files.tokenizer))
    generation_config(tokenizer).save_pretrained(str(files.generation))


def _refuse_other_tokenizer(first: StoredPolicy, tokenizer: Any, policy: StoredPolicy, other: Any) -> None:
    hashes, others = tokenizer_hashes(tokenizer), tokenizer_hashes(other)
    for name, differs in (
        ("vocabulary", hashes["tokenizer_sha256"] != others["tokenizer_sha256"]),
        ("chat template", hashes["chat_template_sha256"] != others["chat_template_sha256"]),
        ("set of tokens that end an answer", end_ids(tokenizer) != end_ids(other)),
    ):
        if differs:
            message = f"{policy.name} has a different {name} than {first.name}, and one vLLM server can have only one"
            remedy = "use --engine transformers, or serve one arm at a time"
            raise ModelError(message, where="--arm", remedy=remedy)
