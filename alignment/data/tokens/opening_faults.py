"""The fault of an answer that cannot follow its prompt, because the template renders the prompt differently with it.

This happens where a generation prompt opens a thought, or ends it, and the answer does the opposite. Settings that
would help are tried, so that only those are named that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from alignment.core.errors import DataError
from alignment.data.templates import Templates, each, options_of, trained_as, with_options
from alignment.data.tokens.common_beginning import in_common

_SHOWN = 40
_KEEPS_TURNS = (
    "set model.chat_template=chatml, which renders every turn unchanged (but does not support tools), or "
    "path:FILE of a template that does"
)


def other_opening(templates: Templates, before: str, after: str, helps: Callable[[Templates], bool]) -> DataError:
    """The fault of a prompt ``before`` that is not the beginning of ``after``, the same turns with an answer.

    ``helps`` says whether the answer could follow its prompt if these templates rendered both.
    """
    start = max(0, in_common(before, after) - _SHOWN // 2)
    working = [setting for setting, candidate in _candidates(templates) if helps(candidate)]
    remedies = [f"set {setting}" for setting in working] or [_KEEPS_TURNS]
    return DataError(
        "the chat template renders a prompt differently when an answer follows it: without the answer, the prompt "
        "ends with "
        f"{before[-_SHOWN:]!r}, and with the answer there is {after[start : start + _SHOWN]!r}",
        remedy=", or ".join(remedies),
    )


def _candidates(templates: Templates) -> Iterator[tuple[str, Templates]]:
    """Settings that may help, with the templates that they give."""
    for name in sorted(name for name in options_of(templates) if "thinking" in name):
        for value in (False, True):
            yield f"model.template_options.{name}={str(value).lower()}", with_options(templates, {name: value})
    for source, text in filter(None, map(trained_as, each(templates))):
        yield f"model.chat_template={source}", text
