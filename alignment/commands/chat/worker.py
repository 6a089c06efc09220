"""Talking to policies: ``python -m alignment.commands.chat.worker VOICES.json``, which ``align chat`` calls.

The file names one policy or two, and how they answer. Lines come from a terminal or from a pipe. What a model says
never reaches the terminal as a command to it.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from alignment.commands.chat.chat_session import Manner, Voice, load_voice
from alignment.config.model import Dtype
from alignment.core.errors import AlignmentError, DataError
from alignment.core.streams import Unfailing, make_unfailing
from alignment.core.terminal import Terminal, complain, visible

INTERRUPTED = 130
WIDE = 100
"""Columns of a terminal in which two answers stand beside each other."""

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the fault."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the driver ignores it meanwhile, which is inherited
    (file,) = sys.argv[1:] if arguments is None else arguments
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b.*")
    screen = Screen()
    try:
        voices = [_load(one, Manner(**told["manner"]), screen) for one in told["voices"]]
        screen.note(HELP)
        converse(voices, screen)
    except AlignmentError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _load(told: dict[str, str | None], manner: Manner, screen: Screen) -> Voice:
    screen.note(f"{told['name']}: {told['described']} …")
    artifact, base = (Path(told[key] or "") if told[key] else None for key in ("artifact", "base"))
    return load_voice(
        str(told["name"]),
        artifact,
        base,
        Dtype(told["dtype"]),
        manner=manner,
        chat_template=told["chat_template"],
    )


def converse(voices: Sequence[Voice], screen: Screen) -> None:
    """Lines in, answers out, until there are no more or the user ends it."""
    for line in screen.lines():
        words = line.strip()
        if words == "/exit" or screen.is_gone:
            return
        if words == "/reset":
            for voice in voices:
                voice.forget()
            screen.note("a new conversation")
        elif words:
            _answer_all(voices, words, screen)


def _answer_all(voices: Sequence[Voice], words: str, screen: Screen) -> None:
    beside = len(voices) > 1 and screen.is_wide
    heard = [Heard(voice.name) for voice in voices]
    for voice, one in zip(voices, heard, strict=True):
        if beside:
            screen.note(f"{voice.name} is thinking …")
            _answer(voice, words, one.add, screen)
        else:
            screen.write(f"{voice.name}: ")
            _answer(voice, words, screen.write, screen)
            screen.write("\n")
    if beside:
        screen.columns(heard)


def _answer(voice: Voice, words: str, on_text: Callable[[str], None], screen: Screen) -> None:
    """One voice's answer; an interrupt stops it where it is, and the next one speaks."""
    try:
        voice.answer(words, on_text=on_text, note=screen.note)
    except DataError as error:
        on_text(f"[{error}]")
    except KeyboardInterrupt:
        on_text(" [stopped]")


class Heard:
    """An answer that is shown once it is complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""

    def add(self, text: str) -> None:
        """One more piece."""
        self.text += text


class Screen:
    """A terminal, or a pipe: the same words, without colours and prompts."""

    def __init__(self) -> None:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._console = Terminal(markup=False, highlight=False)
        self._asks = sys.stdin.isatty()
        if self._asks:
            import readline  # noqa: F401  input() then knows the arrow keys

    @property
    def is_gone(self) -> bool:
        """Whether nobody reads any more what is said."""
        return isinstance(sys.stdout, Unfailing) and sys.stdout.lost

    @property
    def is_wide(self) -> bool:
        """Whether two answers fit beside each other."""
        return self._console.is_terminal and shutil.get_terminal_size().columns >= WIDE

    def lines(self) -> Iterator[str]:
        """What the user says, line by line."""
        if not self._asks:
            yield from sys.stdin
            return
        while True:
            try:
                yield input("\nyou: ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                self.note(f"\n{HELP}")

    def note(self, text: str) -> None:
        """A word of the program's own."""
        self._console.print(visible(text), style="dim", soft_wrap=True)

    def write(self, text: str) -> None:
        """A piece of an answer, or what stands around it."""
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    def columns(self, heard: Sequence[Heard]) -> None:
        """Answers beside each other."""
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for one in heard:
            table.add_column(visible(one.name), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(one.text.strip())) for one in heard))
        self._console.print(table)


if __name__ == "__main__":
    make_unfailing()
    sys.exit(main())
