"""The page of errors: their classes and exit codes, from alignment/core/errors.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from alignment.config.typed import typed
from alignment.core import errors
from alignment.core.errors import AlignmentError, ConfigError
from alignment.stages.registry import config_classes
from book.markdown import own_docstring, table

_OTHER = re.compile(r"^Other codes: (.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)


def classes() -> list[type[AlignmentError]]:
    """The base class and all classes of errors of the package, each after the one that it derives from."""
    return [AlignmentError, *_below(AlignmentError)]


def _below(cls: type[AlignmentError]) -> Iterator[type[AlignmentError]]:
    for error in cls.__subclasses__():
        if error.__module__ == errors.__name__:
            yield error
            yield from _below(error)


def other_codes() -> dict[int, str]:
    """Codes that no class has, with their meaning: ``{0: "success", …}``. Raises ValueError: the docstring of
    alignment/core/errors.py no longer lists them."""
    listed = _OTHER.search(inspect.getdoc(errors) or "")
    if listed is None:
        raise ValueError(
            "alignment/core/errors.py has no paragraph 'Other codes: …' any more, which the reference shows"
        )
    pairs = re.findall(r"(\d+) ([^,(]+(?:\([^)]*\))?)", " ".join(listed[1].split()))
    return {int(code): meaning.strip(" .") for code, meaning in pairs}


def exit_codes() -> dict[int, str]:
    """Every exit code with its meaning, in order."""
    of_classes: dict[int, str] = {}
    for cls in classes()[1:]:
        meaning = own_docstring(cls).partition("\n\n")[0]
        known = of_classes.get(cls.exit_code)
        of_classes[cls.exit_code] = f"{known} Or: {meaning[0].lower()}{meaning[1:]}" if known else meaning
    return dict(sorted({**of_classes, **other_codes()}.items()))


def page() -> str:
    """The page."""
    codes = table(["code", "meaning"], ((str(code), meaning) for code, meaning in exit_codes().items()))
    rows = ((f"`{cls.__name__}`", str(cls.exit_code), _parent(cls), own_docstring(cls)) for cls in classes())
    return f"""\
# Errors and exit codes

A command ends with one of these codes. A script can rely on them.

{codes}

Every error is one block of text. It says where the fault is, what is wrong, what is allowed and what to do next:

```text
{_example()}
```

A traceback is always a bug (code 1), in this project or in a package that adds a kind of stage.
[Running](../running.md) says what happens after a stop.

## Classes

Python code that calls the package catches these classes, which are in `alignment.core.errors`.

{table(["class", "code", "is a", "meaning"], rows)}
"""


def _example() -> str:
    """What a command prints for a misspelt key and a value that is not allowed."""
    stage = {"kind": "dpo", "beta": -1, "max_lenght": 512}
    try:
        typed({"name": "run", "stages": {"dpo": stage}}, config_classes())
    except ConfigError as error:
        return error.labelled
    raise ValueError("a faulty recipe is no longer refused, which the reference shows")


def _parent(cls: type[AlignmentError]) -> str:
    return f"`{cls.__mro__[1].__name__}`"
