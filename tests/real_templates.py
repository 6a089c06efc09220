"""Real chat templates of thinking models, and what each must teach: its control tokens and the text that is learned.
The templates are not ours and are in no file of ours: TRL ships them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from alignment.config.model import TemplateChoice
from alignment.data.chat_template import set_template
from alignment.data.templates import trl_templates
from alignment.data.turns import Message
from tests.tiny import tiny_bpe

NAME, ARGUMENTS = "add", {"a": 2}

Learned = Callable[[Message], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family's tokenizer has: ``control`` tokens, ``eos``, and ``words`` that are other added tokens."""

    control: tuple[str, ...]
    eos: str
    words: tuple[str, ...] = ()
    bos: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A template of a family with ``options``. ``learned`` is the text that an answer teaches. ``keeps`` says whether
    earlier turns stay as they were, ``with_thought`` and ``without_thought`` which answers can follow the prompt,
    and ``calls`` whether the template renders tools."""

    name: str
    family: Family
    learned: Learned
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps: bool = False
    with_thought: bool = True
    without_thought: bool = True
    calls: bool = True

    @property
    def title(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


QWEN = Family(
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    words=("<think>", "</think>", "<tool_call>", "</tool_call>"),
)
GPT_OSS = Family(
    control=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"),
    eos="<|return|>",
)
DEEPSEEK = Family(
    control=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    words=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
)
PHI_3 = Family(control=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), eos="<|endoftext|>")
PHI_4 = Family(control=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), eos="<|im_end|>")


def _json_call(message: Message) -> str:
    return "".join(
        f'<tool_call>\n{{"name": "{NAME}", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
        for _ in message.tool_calls
    )


def _xml_call(message: Message, end: str = "") -> str:
    call = f"<tool_call>\n<function={NAME}>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>{end}"
    return call * len(message.tool_calls)


def _qwen3(message: Message) -> str:
    return f"<think>\n{message.thought}\n</think>\n\n{message.content}{_json_call(message)}<|im_end|>"


def _qwen3_unthinking(message: Message) -> str:
    return f"{message.content}{_json_call(message)}<|im_end|>"


def _qwen3_5(message: Message) -> str:
    return f"{message.thought}\n</think>\n\n{message.content}{_xml_call(message)}<|im_end|>"


def _qwen3_5_unthinking(message: Message) -> str:
    return f"{message.content}{_xml_call(message)}<|im_end|>"


def _nemotron(message: Message) -> str:
    answer = f"{message.thought}\n</think>\n{message.content}".rstrip()
    return (f"{answer}\n{_xml_call(message, chr(10))}" if message.tool_calls else answer) + "<|im_end|>"


def _nemotron_tight(message: Message) -> str:
    answer = f"{message.thought}</think>{message.content}".rstrip()
    return (f"{answer}\n{_xml_call(message, chr(10))}" if message.tool_calls else answer) + "<|im_end|>"


def _nemotron_unthinking(message: Message) -> str:
    if not message.tool_calls:
        return f"{message.content}<|im_end|>"
    return f"\n{_xml_call(message, chr(10))}<|im_end|>"


def _gpt_oss(message: Message) -> str:
    thought = f"<|channel|>analysis<|message|>{message.thought}<|end|><|start|>assistant" if message.thought else ""
    if not message.tool_calls:
        return f"{thought}<|channel|>final<|message|>{message.content}<|return|>"
    return f"{thought} to=functions.{NAME}<|channel|>commentary json<|message|>{json.dumps(ARGUMENTS)}<|call|>"


def _deepseek_r1(message: Message) -> str:
    return f"{message.thought}\n</think>\n\n{message.content}<｜end▁of▁sentence｜>"


def _inline(message: Message) -> str:
    return f"<think>\n{message.thought}\n</think>\n\n{message.content}" if message.thought else message.content


def _phi_3(message: Message) -> str:
    return f"{_inline(message)}<|end|>\n<|endoftext|>"


THINKING, UNTHINKING = {"enable_thinking": True}, {"enable_thinking": False}
CASES = [
    Case(name="qwen3", family=QWEN, learned=_qwen3),
    Case(name="qwen3", family=QWEN, learned=_qwen3_unthinking, options=UNTHINKING, with_thought=False),
    Case(name="qwen3_training", family=QWEN, learned=_qwen3, keeps=True),
    Case(name="qwen3_5_think", family=QWEN, learned=_qwen3_5),
    Case(name="qwen3_5_think_training", family=QWEN, learned=_qwen3_5, keeps=True),
    Case(name="qwen3_5_nothink", family=QWEN, learned=_qwen3_5_unthinking, with_thought=False),
    Case(name="qwen3_5_nothink", family=QWEN, learned=_qwen3_5, options=THINKING),
    Case(name="qwen3_6", family=QWEN, learned=_qwen3_5, options={"preserve_thinking": True}, keeps=True),
    Case(name="qwen3_8", family=QWEN, learned=_qwen3_5, options={"reasoning_effort": "low"}, keeps=True),
    Case(name="gptoss", family=GPT_OSS, learned=_gpt_oss),
    Case(name="gptoss", family=GPT_OSS, learned=_gpt_oss, options={"reasoning_effort": "high"}),
    Case(name="gptoss_training", family=GPT_OSS, learned=_gpt_oss),
    *(
        Case(name=f"nemotron_3_{size}", family=QWEN, learned=learned, without_thought=False)
        for learned, sizes in ((_nemotron, ("nano", "super")), (_nemotron_tight, ("ultra", "5_lightning")))
        for size in sizes
    ),
    *(
        Case(
            name=f"nemotron_3_{size}",
            family=QWEN,
            learned=_nemotron_unthinking,
            options=UNTHINKING,
            with_thought=False,
            keeps=True,
        )
        for size in ("nano", "super", "ultra", "5_lightning")
    ),
    Case(
        name="deepseek_r1_distill_training",
        family=DEEPSEEK,
        learned=_deepseek_r1,
        without_thought=False,
        keeps=True,
        calls=False,
    ),
    Case(name="phi3", family=PHI_3, learned=_phi_3, calls=False),
    Case(name="phi3_5", family=PHI_3, learned=_phi_3, calls=False),
]


def text_of(name: str) -> str | None:
    """The template, or None if TRL has none of this name."""
    file = trl_templates().get(name)
    return None if file is None else file.read_text(encoding="utf-8")


def dressed(family: Family, template: str, options: Mapping[str, Any] | None = None) -> Any:
    """A tokenizer of the family with this template and these options."""
    bpe = tiny_bpe(family.control)
    bpe.add_tokens([AddedToken(word, normalized=False) for word in family.words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=family.bos or None, eos_token=family.eos)
    tokenizer.chat_template = template
    set_template(tokenizer, TemplateChoice(options=options or {}))
    return tokenizer
