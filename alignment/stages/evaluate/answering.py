"""The answers of an evaluation's arms: cached ones, or made by their policies in parts that the processes share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.costs.recorder import once_for_each
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import end_ids
from alignment.evaluation.arms import Answered, TokenSum, answer_and_score, grouped, read_answers
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.generate import Sampling, reading_order
from alignment.stages.evaluate import caches
from alignment.stages.evaluate.caches import CachedAnswers
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.evaluate.prompts import ArmPrompts, TurnPrompts, conversations, later_turn, together
from alignment.stages.shared.answer_sampling import made_in_parts
from alignment.stages.shared.policies import Policies, served_answer_and_score
from alignment.stages.shared.policy_logprobs import PolicyRows, from_main, on_main, policy_logprobs
from alignment.training.context import StageContext


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What an arm is asked in one turn: ``per_prompt`` answers for each of its rows, which are among ``held_out``."""

    arm: ArmPrompts
    held_out: Sequence[HeldOutPrompt]
    turn: TurnPrompts
    per_prompt: int
    with_logprobs: bool

    @property
    def prompts(self) -> list[list[int]]:
        """The prompt of each answer."""
        repeats = len(self.turn.rows) * self.per_prompt // len(self.turn.prompts)
        return [prompt for prompt in self.turn.prompts for _ in range(repeats)]

    @property
    def texts(self) -> list[list[list[int]]]:
        """The texts to score after each answer's prompt: a reference answer to that prompt, once, where there is
        one."""
        return [
            [reference.ids] if number == 0 and reference is not None and reference.prompt is None else []
            for reference in self.turn.references
            for number in range(self.per_prompt)
        ]

    def file(self, config: EvaluateConfig, context: StageContext) -> Path:
        ends, scored = sorted(end_ids(self.arm.tokenizer)), self.with_logprobs
        return caches.answers_file(config, context, self.arm.policy, self.turn, ends=ends, with_logprobs=scored)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """Has the policies of arms answer held-out prompts. Every process must call its methods."""

    config: EvaluateConfig
    context: StageContext
    policies: Policies

    def arms_at_once(self, num_rows: int) -> int:
        """How many arms answer at once: so many that the processes can divide their batches evenly. One process takes
        one arm after the other. An engine has one policy at a time."""
        if self.policies.served is not None:
            return 1
        batches = -(-num_rows * self.config.answers.per_prompt // self.config.batch_size)
        return self.context.world_size // math.gcd(self.context.world_size, batches)

    def answers_of_arms(
        self,
        arm_prompts: Mapping[str, ArmPrompts],
        rows: Sequence[HeldOutPrompt],
        *,
        with_logprobs: Collection[str],
        progress: Callable[[int], None],
    ) -> dict[str, Answered]:
        """The arms' answers, on every process. ``with_logprobs`` are the arms whose answers need log-probabilities.
        ``progress`` receives how many turns are done."""
        per_prompt = self.config.answers.per_prompt
        turns: dict[str, list[Answered]] = {name: [] for name in arm_prompts}
        done = 0
        for number in range(max(row.num_turns for row in rows)):
            requests = [
                _Request(
                    arm=arm,
                    held_out=rows,
                    turn=later_turn(arm, rows, conversations(rows, turns[name], per_prompt), number=number)
                    if number
                    else arm.first,
                    per_prompt=per_prompt,
                    with_logprobs=name in with_logprobs,
                )
                for name, arm in arm_prompts.items()
            ]

            def of_turn(answers: int, before: int = done) -> None:
                progress(before + answers // per_prompt)

            for of_arm, request, cached in zip(
                turns.values(), requests, self._answered(requests, progress=of_turn), strict=True
            ):
                of_arm.append(
                    Answered(
                        answers=read_answers(request.arm.tokenizer, cached.ids),
                        logprobs=cached.logprobs,
                        references=cached.references,
                        seconds=cached.seconds,
                        per_prompt=per_prompt,
                    )
                )
                done += len(request.turn.rows)
        return {name: together(rows, of_arm) for name, of_arm in turns.items()}

    def _answered(self, requests: Sequence[_Request], *, progress: Callable[[int], None]) -> list[CachedAnswers]:
        """Cached answers, or those that the policies make; ``progress`` receives how many there are. The main process
        reads and writes the cache."""

        def cached() -> list[tuple[Path, CachedAnswers | None]]:
            files = [request.file(self.config, self.context) for request in requests]
            return [(file, caches.read_answers(file)) for file in files]

        stored = from_main(self.context, cached)
        missing = [
            (request, file) for request, (file, answers) in zip(requests, stored, strict=True) if answers is None
        ]
        before = sum(len(answers.ids) for _, answers in stored if answers is not None)
        made = self._made(missing, progress=lambda done: progress(before + done))
        if self.context.is_main:
            for (_, file), answers in zip(missing, made, strict=True):
                caches.write_answers(file, answers)
        of_missing = iter(made)
        return [next(of_missing) if answers is None else answers for _, answers in stored]

    def _made(
        self, missing: Sequence[tuple[_Request, Path]], *, progress: Callable[[int], None]
    ) -> list[CachedAnswers]:
        """Answers to requests, made in parts that the processes share; files name what the answers depend on. A part is
        a batch, which is computed as a whole, so that its answers do not depend on the number of processes. An engine
        batches by itself; the main process, which started it, asks it for all."""
        samplings = [self._sampling(request.turn) for request, _ in missing]
        served = self.policies.served
        parts = [
            (index, sorted(part))
            for index, (request, _) in enumerate(missing)
            for part in grouped(
                reading_order(request.prompts), len(request.prompts) if served else self.config.batch_size
            )
        ]
        ends = list(accumulate((len(part) for _, part in parts), initial=0))

        def make(number: int) -> dict[str, Any]:
            index, part = parts[number]
            return self._answers_of_part(
                missing[index][0],
                part,
                sampling=samplings[index],
                progress=lambda answers: progress(ends[number] + answers),
            )

        def prepare() -> None:
            if served is not None:
                (request,) = (request for request, _ in missing)
                on_main(self.context, lambda: self._loaded(request))
                served.prepare(request.arm.policy, max(map(len, request.turn.prompts)) + self.config.max_new_tokens)

        values = made_in_parts(
            self.context,
            "answers",
            [[missing[index][1].name, part] for index, part in parts],
            make,
            progress=lambda done: progress(ends[done]),
            prepare=prepare,
        )
        apart = self._references_apart([request for request, _ in missing])
        made = []
        for index, (request, _) in enumerate(missing):
            of_request = [(part, value) for (owner, part), value in zip(parts, values, strict=True) if owner == index]
            made.append(_joined(request, of_request, apart.get(index, [])))
        return made

    def _answers_of_part(
        self,
        request: _Request,
        part: Sequence[int],
        *,
        sampling: Sampling | None,
        progress: Callable[[int], None],
    ) -> dict[str, Any]:
        """Token ids of some answers, log-probabilities of these and of references, and the seconds that they took."""
        model = self._loaded(request)
        started, prompts, texts = time.monotonic(), request.prompts, request.texts
        answer = partial(answer_and_score, batch_size=self.config.batch_size)
        if self.policies.served is not None:
            answer = partial(served_answer_and_score, self.policies.served)
        asked = [prompts[index] for index in part], [texts[index] for index in part]
        forms = tuple(
            (type(module), *(weights.shape for weights in module.parameters(recurse=False)))
            for module in model.modules()
        )

        def answers() -> Any:
            return answer(
                model,
                *asked,
                max_new_tokens=self.config.max_new_tokens,
                end_ids=sorted(end_ids(request.arm.tokenizer)),
                with_own=request.with_logprobs,
                progress=progress,
                sampling=None if sampling is None else replace(sampling, uniforms=sampling.uniforms[list(part)]),
            )

        ids, sums = once_for_each((forms, str(asked), request.with_logprobs), answers)
        return {"ids": ids, "sums": sums, "seconds": time.monotonic() - started}

    def _loaded(self, request: _Request) -> PreTrainedModel:
        model = self.policies.load(request.arm.policy)
        where = f"stages.{self.context.spec.stage}"
        _refuse_too_long(model, request, self.config.max_new_tokens, where=where)
        return model

    def _references_apart(self, requests: Sequence[_Request]) -> dict[int, list[float]]:
        """Log-probabilities of references that follow their own prompts, by the index of the request."""
        apart = {
            index: [reference for reference in request.turn.references if reference and reference.prompt]
            for index, request in enumerate(requests)
        }
        asked = {
            index: PolicyRows(
                policy=requests[index].arm.policy,
                prompts=[reference.prompt or [] for reference in references],
                answers=[reference.ids for reference in references],
            )
            for index, references in apart.items()
            if references
        }
        return policy_logprobs(self.context, "reading references", self.policies, asked) if asked else {}

    def _sampling(self, asked: TurnPrompts) -> Sampling | None:
        """The same random numbers for every arm, and others in each turn; None for greedy answers."""
        answers = self.config.answers
        if answers.temperature == 0.0:
            return None
        generator = self.context.generator(*caches.seed_of(asked))
        num_rows = max(asked.rows) + 1  # rows without this turn have numbers too, which keeps the others' the same
        shape = (num_rows, answers.per_prompt, self.config.max_new_tokens)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[asked.rows]
        return Sampling(temperature=answers.temperature, uniforms=uniforms.flatten(0, 1))


def _joined(
    request: _Request, parts: Sequence[tuple[Sequence[int], dict[str, Any]]], apart: Sequence[float]
) -> CachedAnswers:
    """The parts of a request as a whole; ``apart`` are the log-probabilities of references with their own prompts."""
    ids = {index: answer for part, value in parts for index, answer in zip(part, value["ids"], strict=True)}
    sums = {index: own for part, value in parts for index, own in zip(part, value["sums"], strict=True)}
    of_references = iter(apart)
    references = [
        None
        if reference is None
        else TokenSum(
            logprob=next(of_references) if reference.prompt else sums[number * request.per_prompt][-1],
            tokens=len(reference.ids),
        )
        for number, reference in enumerate(request.turn.references)
    ]
    return CachedAnswers(
        ids=[ids[index] for index in range(len(ids))],
        logprobs=[sums[index][0] for index in range(len(sums))] if request.with_logprobs else None,
        references=references,
        seconds=sum(value["seconds"] for _, value in parts),
    )


def _refuse_too_long(model: PreTrainedModel, request: _Request, max_new_tokens: int, *, where: str) -> None:
    positions, turn, source = positions_of(model.base_model), request.turn, request.arm.policy.source
    longest = max(map(len, turn.prompts)) + max_new_tokens
    in_turn = f" in turn {turn.number + 1}" if turn.number else ""
    if longest > positions:
        raise ModelError(
            f"{source} has {positions} positions, but the longest prompt with its answer needs {longest}{in_turn}",
            where=where,
            remedy="lower max_new_tokens or few_shot.count, or leave out long prompts",
        )
    tokens, row = max(zip(turn.tokens_with_references, turn.rows, strict=True))
    if tokens > positions:
        raise ModelError(
            f"{source} has {positions} positions, but a prompt with its reference answer needs {tokens}{in_turn}",
            where=request.held_out[row].where,
            remedy="leave out the row, or lower few_shot.count",
        )
