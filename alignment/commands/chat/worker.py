"""A chat with policies: ``python -m alignment.commands.chat.worker CHAT.json``, which ``align chat`` calls.

The file names one or two policies and the options for their answers. Lines come from a terminal or from a pipe. A
model's answer never reaches the terminal as a control sequence.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.table import Table
from rich.text import Text

from alignment.commands.chat.chat_session import ChatSession, GenerationOptions, load_session
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.config.launch import SamplingConfig
from alignment.core.errors import DataError, StageError
from alignment.core.terminal import Terminal, Unfailing, visible

INTERRUPTED = 130
WIDE = 100
"""Columns of a terminal from which two answers are printed side by side."""

HELP = "/reset starts again, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the driver ignores it, which is inherited
    (file,) = sys.argv[1:] if arguments is None else arguments
    chat = json.loads(Path(file).read_text(encoding="utf-8"))
    silence_libraries()
    screen = Screen()
    try:
        engine = SamplingConfig(**chat["engine"]) if chat["engine"] else None
        options = GenerationOptions(**chat["options"])
        sessions = []
        for policy in (StoredPolicy(**session) for session in chat["sessions"]):
            screen.note(f"{policy.name}: {policy.described} …")
            sessions.append(load_session(policy, options=options, engine=engine))
        with ExitStack() as open_sessions:
            for session in sessions:
                open_sessions.callback(session.answerer.close)
            screen.note(HELP)
            converse(sessions, screen)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def converse(sessions: Sequence[ChatSession], screen: Screen) -> None:
    """Answers each line of the user until the input ends or the user exits."""
    for line in screen.lines():
        words = line.strip()
        if words == "/exit" or screen.is_gone:
            return
        if words == "/reset":
            for session in sessions:
                session.forget()
            screen.note("a new conversation")
        elif words:
            _answer_all(sessions, words, screen)


def _answer_all(sessions: Sequence[ChatSession], words: str, screen: Screen) -> None:
    """Answers side by side if there is room, else below each other as they come."""
    beside = len(sessions) > 1 and screen.is_wide
    answers: list[tuple[str, list[str]]] = [(session.name, []) for session in sessions]
    for session, (name, pieces) in zip(sessions, answers, strict=True):
        if beside:
            screen.note(f"{name} is thinking …")
            _answer(session, words, pieces.append, screen)
        else:
            screen.write(f"{name}: ")
            _answer(session, words, screen.write, screen)
            screen.write("\n")
    if beside:
        screen.columns([(name, "".join(pieces)) for name, pieces in answers])


def _answer(session: ChatSession, words: str, on_text: Callable[[str], None], screen: Screen) -> None:
    """Prints the answer of one session; an interrupt stops it, and the next session answers."""
    try:
        session.answer(words, on_text=on_text, note=screen.note)
    except (DataError, StageError) as error:
        on_text(f"[{error}]")
    except KeyboardInterrupt:
        on_text(" [stopped]")


class Screen:
    """A terminal, or a pipe, which gets the same text without colours and prompts."""

    def __init__(self) -> None:
        if sys.stdin is None:  # closed by whoever started the command
            sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._console = Terminal(markup=False, highlight=False)
        self._asks = sys.stdin.isatty()
        if self._asks:
            with suppress(ImportError):  # Python may be built without it
                import readline  # noqa: F401  makes input() support the arrow keys

    @property
    def is_gone(self) -> bool:
        """Whether the output stream is closed."""
        return isinstance(sys.stdout, Unfailing) and sys.stdout.lost

    @property
    def is_wide(self) -> bool:
        """Whether two answers fit side by side."""
        return self._console.is_terminal and shutil.get_terminal_size().columns >= WIDE

    def lines(self) -> Iterator[str]:
        """The user's input, line by line."""
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
        """Prints a message of the program."""
        self._console.print(visible(text), style="dim", soft_wrap=True)

    def write(self, text: str) -> None:
        """Prints a part of an answer or of its surroundings."""
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    def columns(self, answers: Sequence[tuple[str, str]]) -> None:
        """Prints answers side by side, each below its name."""
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for name, _ in answers:
            table.add_column(visible(name), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(text.strip())) for _, text in answers))
        self._console.print(table)


if __name__ == "__main__":
    run_as_program(main)
