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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedModel

from alignment.commands.shared.loaded_policies import parts_of
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.config.launch import SamplingConfig
from alignment.config.model import Dtype
from alignment.core.errors import DataError, StageError
from alignment.core.model_files import positions_in
from alignment.core.terminal import Terminal, Unfailing, visible
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.turns import Message
from alignment.engines.completions import Asked, Generation
from alignment.engines.engine_environment import interpreter
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import RANKS, VllmOptions
from alignment.models.assembly.engine_weights import served_weights, write_merged
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.training.context import own_device

MOST_TOKENS = 4096
"""Of a conversation behind vLLM, which must have room for the keys and values of all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnAnswerer:
    """Generates with a loaded model."""

    model: PreTrainedModel

    @property
    def positions(self) -> int:
        """The number of tokens that it can read and write."""
        return positions_of(unwrapped(self.model).base_model)

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Calls ``on_token`` with each token as it is generated; ``seed`` determines the draws above temperature 0."""
        sampling = None
        if generation.temperature != 0:
            rng = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(1, generation.max_new_tokens, dtype=torch.float64, generator=rng)
            sampling = Sampling(temperature=generation.temperature, uniforms=uniforms)
        generate(
            self.model,
            [prompt],
            max_new_tokens=generation.max_new_tokens,
            end_ids=generation.end_ids,
            batch_size=1,
            sampling=sampling,
            on_token=lambda _, token: on_token(token),
        )

    def close(self) -> None:
        """It started nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAnswerer:
    """Asks the engine of ``session``."""

    session: EngineSession
    weights: Weights
    positions: int

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Asks for a stream of tokens."""
        self.session.stream(self.weights, Asked(prompt=prompt, answers=1, seed=seed), generation, on_token)

    def close(self) -> None:
        """Ends what it started."""
        self.session.close()


def _served_answerer(policy: Lineage, dtype: Dtype, config: SamplingConfig) -> ServedAnswerer:
    """Starts a server for the policy, which ends with this process."""
    interpreter(config.python, package="vllm", where="--engine-python")
    session = EngineSession(config, where="--engine")
    needed = served_weights(policy, highest_rank=RANKS[-1])
    positions = min(MOST_TOKENS, positions_in(needed.below.base) or _positions_by_default(needed.below.base))
    model, on_gpu = write_merged(needed.below, DTYPES[dtype], session.folder / "base"), own_device().type == "cuda"
    session.start(VllmOptions(model=model, dtype=dtype.value, max_length=positions, rank=needed.rank, on_gpu=on_gpu))
    weights = Weights() if needed.adapter is None else Weights(name="policy", folder=needed.adapter)
    session.use(weights)
    return ServedAnswerer(session=session, weights=weights, positions=positions)


def _positions_by_default(model: Path) -> int:
    """Those of a configuration that leaves them to its class."""
    config = AutoConfig.from_pretrained(str(model)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or MOST_TOKENS


HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Options for answers. A ``temperature`` of 0 takes the most likely token; otherwise ``seed`` and the number of the
    answer determine the random draws. ``max_new_tokens`` limits an answer."""

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(kw_only=True)
class ChatSession:
    """A policy called ``name``, what answers for it, and its conversation so far."""

    name: str
    answerer: OwnAnswerer | ServedAnswerer
    tokenizer: Any
    options: GenerationOptions
    history: list[Message] = field(default_factory=list)
    answers: int = 0

    def __post_init__(self) -> None:
        """Renders a first prompt, so that an unusable template is refused at once."""
        self.ends = end_ids(self.tokenizer)
        self._rendered([Message(role="user", content="Hi.")])

    def forget(self) -> None:
        """Starts a new conversation."""
        self.history.clear()

    def answer(self, words: str, *, on_text: Callable[[str], None], note: Callable[[str], None]) -> None:
        """Answers the user's ``words``: ``on_text`` receives the text as it is generated; a KeyboardInterrupt ends it.
        ``note`` receives a message if turns were dropped because the conversation became too long for the model. Raises
        DataError: the template refuses these words, or they alone are too long; the history does not change then."""
        asked = Message(role="user", content=words)
        prompt = self._fitting(asked, note)
        room = self.answerer.positions - len(prompt)
        text = _Text(self.tokenizer, on_text)
        generation = Generation(
            max_new_tokens=min(self.options.max_new_tokens, room),
            temperature=self.options.temperature,
            end_ids=sorted(self.ends),
        )
        try:
            self.answerer.answer(prompt, generation, (self.options.seed << 20) + self.answers, text.add)
            text.finish()
        finally:
            self.answers += 1
            if text.text:
                self.history += [asked, Message(role="assistant", content=text.text)]

    def _fitting(self, asked: Message, note: Callable[[str], None]) -> list[int]:
        """The prompt's tokens; the oldest exchanges are dropped until there is room for an answer, or at least half of
        the model's positions."""
        dropped, left = 0, list(self.history)
        positions = self.answerer.positions
        room = min(self.options.max_new_tokens, positions // 2)
        prompt = self._rendered([*left, asked])
        while left and len(prompt) + room > positions:
            left, dropped = left[2:], dropped + 1
            prompt = self._rendered([*left, asked])
        if len(prompt) >= positions:
            message = f"that makes {len(prompt)} tokens, but {self.name} has room for {positions}, including its answer"
            raise DataError(message, remedy="write less")
        if dropped:
            self.history = left
            turns = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            note(f"{self.name}: the oldest {turns} dropped, because the model reads at most {positions} tokens")
        return prompt

    def _rendered(self, turns: list[Message]) -> list[int]:
        system = [Message(role="system", content=self.options.system)] if self.options.system else []
        return prompt_ids(self.tokenizer, [*system, *turns])


class _Text:
    """Decodes tokens and passes the text on, only whole characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip().rstrip(HALF_A_CHARACTER))

    def finish(self) -> None:
        """Ends the text: a trailing replacement character is now the model's own."""
        self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip())

    def _emit(self, whole: str) -> None:
        new = whole[len(self.text) :]
        self.text = whole if len(whole) > len(self.text) else self.text
        if new:
            self._on_text(new)


def load_session(
    policy: StoredPolicy, *, options: GenerationOptions, engine: SamplingConfig | None = None
) -> ChatSession:
    """A session with a policy; with ``engine`` a vLLM server answers. Raises ArtifactError, ModelError, DataError,
    ConfigError, StageError."""
    lineage, tokenizer = parts_of(*policy.sources)
    dtype = Dtype(policy.dtype)
    if engine is None:
        model = load_policy(lineage, DTYPES[dtype]).to(own_device())
        use_flat_attention(model)
        answerer: OwnAnswerer | ServedAnswerer = OwnAnswerer(model=model)
    else:
        answerer = _served_answerer(lineage, dtype, engine)
    return ChatSession(name=policy.name, answerer=answerer, tokenizer=tokenizer, options=options)


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
