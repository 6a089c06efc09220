"""A model folder's tokenizer, with a chat template of the user's choice, and what stands for it in a fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from alignment.data.chat_template import set_template
from alignment.errors import ModelError


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder, with a pad token (EOS where it has none: masks never look at it).

    ``chat_template`` names one that stands in for its own (alignment/data/chat_template.py).

    Raises:
        ModelError: no tokenizer, or one without an EOS token.
        DataError: the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable tokenizer: {error}", where=str(folder)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so an answer could never end", where=str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        set_template(tokenizer, chat_template)
    return tokenizer


def tokenizer_hashes(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the vocabulary with its special tokens, and of the chat template."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens])
    template = tokenizer.chat_template or ""
    return {
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
