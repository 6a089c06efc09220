"""The lines of a model card that use what was exported."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignment.commands.export.export_options import GGUF, VLLM
from alignment.core.artifacts import POLICY, REWARD_MODEL, Manifest

_CLASS = {POLICY: "AutoModelForCausalLM", REWARD_MODEL: "AutoModelForSequenceClassification"}


def usage_lines(manifest: Manifest, form: str, files: Sequence[str], turn_end: str | None) -> list[str]:
    """Markdown with commands or Python; ``turn_end`` is the token that ends a turn, None without a chat template."""
    if form == GGUF:
        return ["```console", *_programs(manifest, files), "```"]
    served = ["```bash", "vllm serve .  # in this folder", "```", ""] if form == VLLM else []
    return [*served, "```python", *_python(manifest, form, turn_end), "```"]


def _programs(manifest: Manifest, files: Sequence[str]) -> list[str]:
    """Commands for a folder with a GGUF file."""
    (file,) = (name for name in files if name.endswith(".gguf"))
    ollama = [f"$ ollama create {manifest.stage} -f Modelfile", f"$ ollama run {manifest.stage}"]
    return [*(ollama if "Modelfile" in files else []), f"$ llama-server --model {file} --jinja"]


def _python(manifest: Manifest, form: str, turn_end: str | None) -> list[str]:
    kind = _CLASS[manifest.kind]
    if form == "adapter":
        return [
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer, GenerationConfig",
            "",
            f'base = {kind}.from_pretrained("FOLDER_OF_THE_BASE", dtype="float32")  # as they were compared',
            'base.generation_config = GenerationConfig.from_pretrained("FOLDER")  # its own may end answers elsewhere',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    whole = ', dtype="float32")  # which does not round its head' if manifest.kind == REWARD_MODEL else ")"
    loaded = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("FOLDER"{whole}',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
    return [*loaded, *(_score(turn_end) if manifest.kind == REWARD_MODEL else _answer(turn_end))]


def _answer(turn_end: str | None) -> list[str]:
    """Generates as evaluations do unless their settings say otherwise: the most likely tokens."""
    if turn_end is None:
        ids = ['ids = tokenizer("…", return_tensors="pt")']
    else:
        ids = [
            'turns = [{"role": "user", "content": "…"}]',
            "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
            'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        ]
    return [
        *ids,
        "answer = model.generate(**ids, max_new_tokens=256, do_sample=False)  # without it: sampled at temperature 1",
        "print(tokenizer.decode(answer[0]))",
    ]


def _score(turn_end: str | None) -> list[str]:
    """Scores a conversation at the end of its last turn; the template may add a line break, which was not trained."""
    if turn_end is None:
        return []
    end = json.dumps(turn_end, ensure_ascii=False)
    return [
        'turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
        "text = tokenizer.apply_chat_template(turns, tokenize=False)",
        f"text = text[: text.rindex({end}) + {len(turn_end)}]  # the score is that of {end}, which ends the answer",
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        "print(model(**ids).logits[0, 0])",
    ]
