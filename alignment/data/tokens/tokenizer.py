"""Loads a model folder's tokenizer, with a chat template of the user's choice, and hashes it for fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from alignment.config.model import TemplateChoice
from alignment.core.errors import ModelError
from alignment.core.files import parse_json
from alignment.core.model_files import vocabulary_in
from alignment.data.chat_template import set_template
from alignment.data.tokens.tokenize import STOPS


def load_tokenizer(folder: Path, template: TemplateChoice | None = None, *, model: Path | None = None) -> Any:
    """The tokenizer of a model folder, with a pad token: EOS if it has none that the model knows. Masks never depend on
    the pad token. A tokenizer class of transformers may add one that is no token of the model. ``template`` replaces
    its own template or gives it options (alignment/data/chat_template.py). ``model`` is the folder of the model if it
    is another one. Raises ModelError: there is no usable tokenizer, it has no EOS token, or generation_config.json
    cannot be read. Raises DataError: the template cannot be read, or does not read an option."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer cannot be used: {error}", where=str(folder)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so an answer could never end", where=str(folder))
    ids = vocabulary_in(model or folder)
    if tokenizer.pad_token_id is None or (ids is not None and tokenizer.pad_token_id >= ids):
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        set_template(tokenizer, template)
    setattr(tokenizer, STOPS, stop_ids(model or folder))
    return tokenizer


def stop_ids(folder: Path) -> frozenset[int]:
    """The tokens at which generation_config.json ends an answer (Llama 3 has three); empty without that file. Raises
    ModelError: the file cannot be read, or does not hold token ids."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return frozenset()
    try:
        ids = parse_json(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(file)) from error
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelError(f"eos_token_id is {ids}; it must be a token id or a list of them", where=str(file))
    return frozenset(ids)


def stops_alike(first: Any, second: Any) -> bool:
    """Whether the models of two tokenizers with the same vocabulary stop at the same tokens."""
    return bool(getattr(first, STOPS, frozenset()) == getattr(second, STOPS, frozenset()))


def tokenizer_hashes(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the vocabulary with its special tokens, and of the chat template, or of several with their names. A
    template that is alone is hashed as its text also if it has the name ``default``, which saving it drops."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens])
    templates = tokenizer.chat_template or ""
    if not isinstance(templates, str) and list(templates) == ["default"]:
        templates = templates["default"]
    text = templates if isinstance(templates, str) else json.dumps(dict(templates), sort_keys=True)
    return {
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def generated_text(tokenizer: Any, answer: Sequence[int]) -> str:
    """The text of an answer's token ids exactly as it was generated, because a scorer may look at spaces."""
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
