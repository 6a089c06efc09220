"""Tiny tokenizers in the dress of the chat model families that people use. Each has its family's control tokens, the
BOS that its tokenizer puts in front of texts, and a chat template of the family's structure. The words in between are
ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from alignment.data.turns import Message
from tests.tiny import CHAT_TEMPLATE, tiny_bpe, tiny_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How a family writes its turns. ``end`` ends a turn and ``eos`` a text; ``bos`` is what the tokenizer puts in
    front of a text, if anything. ``words`` are added tokens that are no control tokens. ``call`` is how a call is
    written, name and arguments left open, and empty where the template knows no tools. ``lead`` stands in front of an
    answer that is text; ``strips`` says that blanks around an answer are lost."""

    template: str
    control: tuple[str, ...]
    end: str
    eos: str
    bos: str = ""
    words: tuple[str, ...] = ()
    call: str = ""
    lead: str = ""
    strips: bool = False
    has_system: bool = True

    def learned(self, turn: Message) -> str:
        """What is learned of an assistant's turn with at most one call, which is rendered without content."""
        if not turn.tool_calls:
            return self.lead + (turn.content.strip() if self.strips else turn.content) + self.end
        called = turn.tool_calls[0]["function"]
        return self.call % (called["name"], json.dumps(called["arguments"], ensure_ascii=False)) + self.end


LLAMA3 = r"""
{{- bos_token -}}
{%- set system = messages and messages[0].role == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- if system or tools -%}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
    {%- if tools -%}
        {{- 'Call a function as {"name": ..., "parameters": ...}. There are:\n\n' -}}
        {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}
    {%- endif -%}
    {{- messages[0].content | trim if system else '' -}}
    {{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.tool_calls -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' -}}
        {{- call.arguments | tojson + '}<|eot_id|>' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' -}}
    {%- else -%}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

QWEN = r"""
{%- set system = messages and messages[0].role == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- '<|im_start|>system\n' + (messages[0].content if system else 'You are a small model.') -}}
{%- if tools -%}
    {{- '\n\nFunctions that you may call:\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
    {{- '\n</tools>\nA call is {"name": ..., "arguments": ...} between <tool_call> and </tool_call>.' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in turns -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' + message.role -}}
        {%- if message.content or not message.tool_calls -%}{{- '\n' + message.content -}}{%- endif -%}
        {%- for call in message.tool_calls -%}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Mistral's own templates put tools, and some the system text, in front of the last user turn, so that earlier turns
# change as the conversation goes on. Here both stand in front of the first.
MISTRAL = r"""
{%- set system = messages and messages[0].role == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for message in turns | rejectattr('tool_calls') | rejectattr('role', 'equalto', 'tool') -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and assistant must alternate') -}}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {%- if loop.first and tools -%}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
        {{- '[INST] ' + (messages[0].content + '\n\n' if loop.first and system else '') + message.content -}}
        {{- '[/INST]' -}}
    {%- elif message.tool_calls -%}
        {{- '[TOOL_CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' -}}
    {%- else -%}
        {{- ' ' + message.content | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

GEMMA = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{- raise_exception('there is no system role') -}}{%- endif -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and model must alternate') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) -}}
    {{- '\n' + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

CHATML = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_CHATML_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_BRACKETS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")

STYLES: Mapping[str, Style] = {
    "llama3": Style(
        template=LLAMA3,
        control=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        bos="<|begin_of_text|>",
        end="<|eot_id|>",
        eos="<|eot_id|>",
        call='{"name": "%s", "parameters": %s}',
        strips=True,
    ),
    "qwen": Style(
        template=QWEN,
        control=_CHATML_CONTROL,
        words=("<tool_call>", "</tool_call>"),
        end="<|im_end|>",
        eos="<|im_end|>",
        call='<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    ),
    "mistral": Style(
        template=MISTRAL,
        control=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", *_TOOL_BRACKETS),
        bos="<s>",
        end="</s>",
        eos="</s>",
        call='[TOOL_CALLS] [{"name": "%s", "arguments": %s}]',
        lead=" ",
        strips=True,
    ),
    "gemma": Style(
        template=GEMMA,
        control=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        end="<end_of_turn>",
        eos="<eos>",
        strips=True,
        has_system=False,
    ),
    "chatml": Style(template=CHATML, control=_CHATML_CONTROL, end="<|im_end|>", eos="<|im_end|>"),
    "smollm2": Style(template=CHAT_TEMPLATE, control=_CHATML_CONTROL, end="<|im_end|>", eos="<|im_end|>"),
}


def styled_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer in one of ``STYLES``; ``smollm2`` is ``tiny_tokenizer``."""
    if name == "smollm2":
        return tiny_tokenizer()
    style = STYLES[name]
    bpe = tiny_bpe(style.control)
    bpe.add_tokens([AddedToken(word, normalized=False) for word in style.words])
    if style.bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", special_tokens=[(style.bos, bpe.token_to_id(style.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=style.bos or None, eos_token=style.eos)
    tokenizer.chat_template = style.template
    return tokenizer


# ---- thinking models ------------------------------------------------------------------------------------------------

# As DeepSeek-V3.1: the thought of an answer is never rendered, an option decides how the prompt opens the turn, and
# arguments of calls have to be text.
DEEPSEEK_LIKE = r"""
{%- if thinking is not defined -%}{%- set thinking = false -%}{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{- message.content -}}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}
    {%- elif message.role == 'assistant' -%}
        {%- set words = message.content.split('</think>')[-1] if '</think>' in message.content else message.content -%}
        {{- '<｜Assistant｜></think>' + words.lstrip() -}}
        {%- for call in message.tool_calls -%}
            {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments -}}
        {%- endfor -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}
"""

# As Phi-4-reasoning: a system text of its own, which replaces the row's, and answers as they are.
PHI_LIKE = r"""
{{- '<|im_start|>system<|im_sep|>Think first.<|im_end|>' -}}
{%- for message in messages if message.role != 'system' -%}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""
