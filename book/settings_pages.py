"""The pages of the configuration: every setting of a run, of a sweep and of each kind of stage."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path

from alignment.config.foreign_keys import FOREIGN
from alignment.config.run import RunConfig, conf_folder
from alignment.config.sweep import SweepConfig
from alignment.config.typed import field_types, group_of, kinds_of, listed_dataclass
from alignment.stages.base import StageKind
from alignment.stages.registry import OURS, registered
from book.markdown import anchor, in_words, table
from book.settings_table import section

TOP = "reference/configuration.md"
GROUPS = "reference/configuration/groups.md"
COMING_FROM = "reference/coming_from.md"
_INTRO = """\
# Configuration

A recipe is a YAML file, and `KEY=VALUE` on the command line changes one of its values. This reference has every key.
It is made from the code, so its defaults are those of this version.

A key is a path: `stages.dpo.optim.lr` is the setting `lr` in the group `optim` of the stage that a recipe calls `dpo`.
A misspelt key or a value that is not allowed ends the command with exit code 2, and the message names what is allowed.
[Recipes](../recipes.md) says how a recipe is written.

In the tables, **°** marks a setting that is not part of a stage's fingerprint: if only this setting changes, no stage
runs again. The content behind a path or a reference still counts."""


def our_kinds() -> dict[str, StageKind]:
    """The built-in kinds of stage by name. Kinds of other packages that are installed here are left out."""
    return {name: row.kind for name, row in registered().items() if row.kind is not None and row.origin == OURS}


def kind_page(name: str) -> str:
    """The name of the page of a kind of stage."""
    return f"reference/configuration/{name}.md"


def pages() -> dict[str, str]:
    """The pages by name: one of the run, one for each kind of stage, one of the groups that several of these have."""
    layout = _Layout()
    texts = {TOP: _top(layout)}
    for name, kind in our_kinds().items():
        texts[kind_page(name)] = _kind(kind, layout)
    texts[GROUPS] = _groups(layout)
    texts[COMING_FROM] = _coming_from()
    return texts


def _coming_from() -> str:
    rows = ((f"`{name}`", f"`{ours}`" if ours else "–", remark) for name, (ours, remark) in sorted(FOREIGN.items()))
    return f"""\
# Settings of TRL, axolotl and LLaMA-Factory

The setting that does the same here. `optim.lr` is a setting of a stage, `stages.sft.optim.lr`; `adapter=qlora` is a
choice, `adapter: qlora` in a recipe. If a recipe or a command has one of these names, the error gives the key. A
name with – has no setting here; leave it out.

{table(["there", "here", "what differs"], rows)}"""


def classes_below(cls: type) -> Iterator[type]:
    """The dataclass and those of its groups of settings, each before what is inside it, without repetition."""
    yield from dict.fromkeys(_below(cls))


def _below(cls: type) -> Iterator[type]:
    yield cls
    for hint in field_types(cls).values():
        for inner in filter(None, (group_of(hint), listed_dataclass(hint), *kinds_of(hint).values())):
            yield from _below(inner)


class _Layout:
    """On which page each dataclass is: on that of the kind that alone has it, or on the page of groups."""

    def __init__(self) -> None:
        roots = {
            TOP: [RunConfig, SweepConfig],
            **{kind_page(name): [kind.config] for name, kind in our_kinds().items()},
        }
        owners: dict[type, list[str]] = {}
        for page, classes in roots.items():
            for cls in dict.fromkeys(inner for root in classes for inner in classes_below(root)):
                owners.setdefault(cls, []).append(page)
        self._pages = {cls: pages[0] if len(pages) == 1 else GROUPS for cls, pages in owners.items()}

    def on(self, page: str) -> list[type]:
        """The dataclasses of a page, in order."""
        return [cls for cls, owner in self._pages.items() if owner == page]

    def link(self, cls: type, page: str) -> str:
        """A link from a page to the section of a dataclass."""
        path = posixpath.relpath(self._pages[cls], posixpath.dirname(page)) if self._pages[cls] != page else ""
        return f"[{in_words(cls.__name__)}]({path}#{anchor(in_words(cls.__name__))})"


def _sections(page: str, layout: _Layout, *, without: tuple[type, ...] = ()) -> list[str]:
    """The sections of all dataclasses of a page."""
    classes = (cls for cls in layout.on(page) if cls not in without)
    return [
        section(cls, heading=f"## {in_words(cls.__name__)}", link=lambda cls: layout.link(cls, page)) for cls in classes
    ]


def _top(layout: _Layout) -> str:
    rows = (
        (f"[`{name}`](configuration/{name}.md)", kind.summary, kind.produces or "–")
        for name, kind in our_kinds().items()
    )
    parts = [
        _INTRO,
        "## Kinds of stage",
        table(["kind", "what it does", "makes"], rows),
        "Groups of settings that several kinds have, such as `data`, `adapter` and `optim`, are on "
        "[a separate page](configuration/groups.md).",
        *_sections(TOP, layout),
        "## Choices",
        "`GROUP=NAME` on the command line, or `GROUP: NAME` in a recipe's `defaults`, selects a file in `conf/`. The "
        "file sets only what differs from the defaults above. [Running](../running.md) explains `profile`, and "
        "[Sweeps](../sweeps.md) explains `sweep`.",
        table(["choice", "what its file says"], _choices()),
    ]
    return "\n\n".join(parts)


def _kind(kind: StageKind, layout: _Layout) -> str:
    name, page = kind.name, kind_page(kind.name)
    intro = (
        f"# {name}\n\n{kind.summary[0].upper()}{kind.summary[1:]}. Its settings are under `stages.{name}` in a recipe, "
        f"or under `stages.NAME` beside `kind: {name}`. [Stages](../../stages.md) explains what it does, and "
        "[Configuration](../configuration.md) how to read the tables."
    )
    own = section(kind.config, heading="## Settings", link=lambda cls: layout.link(cls, page))
    return "\n\n".join([intro, own, *_sections(page, layout, without=(kind.config,))])


def _groups(layout: _Layout) -> str:
    intro = (
        "# Groups of settings\n\nSeveral kinds of stage have these groups. If a kind has a different default than "
        "here, its page says so."
    )
    return "\n\n".join([intro, *_sections(GROUPS, layout)])


def _choices() -> Iterator[tuple[str, str]]:
    """Each file of conf/ with the comment that it begins with, or its summary."""
    for file in sorted(conf_folder().rglob("*.yaml")):
        group = file.parent.relative_to(conf_folder()).as_posix()
        if group != ".":
            yield f"`{group}={file.stem}`", _about(file)


def _about(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[: _length_of_comment(lines)])
    summary = next((line.removeprefix("summary:").strip() for line in lines if line.startswith("summary:")), "")
    return comment or summary or "the defaults"


def _length_of_comment(lines: list[str]) -> int:
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
