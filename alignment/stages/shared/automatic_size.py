"""Replaces ``optim.micro_batch_tokens=auto`` by a number before a stage runs (docs/design/0044). The number is the one
that this stage began with, or that a stage like it chose on this machine. Otherwise the stage runs up to its first step
to try sizes, and is thrown away. What runs afterwards is the stage with that number, as if it were set by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch

from alignment.config.launch import Offload, Sharding
from alignment.config.optim import DEFAULT_TOKENS, is_automatic, with_tokens
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.job import StageSpec, memory_key
from alignment.models.assembly.modules import free_unused
from alignment.records import training
from alignment.records.training import OWN_FILE, ChosenSize
from alignment.training.context import StageContext
from alignment.training.sharding import everyones, load_whole_again
from alignment.training.size_search import Choice, SizeChosen, SizeSearch, attainable

Run = Callable[[StageConfig, StageContext], object]


def with_chosen_size(context: StageContext, run: Run) -> StageContext:
    """The context of a stage that has a number; ``run`` runs the stage. Every process must call this. Random numbers
    are as before."""
    if not is_automatic(context.spec.config):
        return context
    key = memory_key(context.spec.config, context.spec.identity, context.spec.inputs)
    size = everyones(_remembered(context, key) if context.is_main else None)[0]
    if size is None:
        with _same_random_numbers(context.device):
            choice = _search(context, run)
        size = ChosenSize(
            tokens=choice.tokens, machine=machine_of(context.device), launch=launch_of(context), tried=[*choice.tried]
        )
    if context.is_main:
        context.notes.append(f"optim.micro_batch_tokens=auto was {size.tokens:,} tokens")
        for file in (context.spec.work / OWN_FILE, training.cache_file(context.spec.artifact.parent, key)):
            training.remember(file, key, size)
    return replace(context, spec=_numbered(context.spec, size.tokens), chosen_tokens=size.tokens)


def machine_of(device: torch.device) -> str:
    """What sizes are remembered for: ``CPU, 2 cores, 25 GB``."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB"
    return f"CPU, {hardware.count_cores()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB"


def launch_of(context: StageContext) -> str:
    """How many processes share the work, and how: ``8 processes, zero3``."""
    spec, number = context.spec, context.world_size
    shared = [spec.sharding.value] * (spec.sharding is not Sharding.none)
    offloaded = [f"offload {spec.offload.value}"] * (spec.offload is not Offload.none)
    return ", ".join([f"{number} process{'es' * (number > 1)}", *shared, *offloaded])


def _remembered(context: StageContext, key: str) -> ChosenSize | None:
    if begun := training.remembered(context.spec.work / OWN_FILE, key):
        return begun[0]
    here = (machine_of(context.device), launch_of(context))
    sizes = training.remembered(training.cache_file(context.spec.artifact.parent, key), key)
    return next((size for size in sizes if (size.machine, size.launch) == here), None)


def _search(context: StageContext, run: Run) -> Choice:
    spec, where = _numbered(context.spec, DEFAULT_TOKENS), f"stages.{context.spec.stage}.optim"
    search = SizeSearch(device=context.device, memory=attainable, where=where)
    try:
        run(spec.config, replace(context, spec=spec, search=search, notes=[]))
    except SizeChosen as end:
        choice = end.choice
    else:
        raise StageError(
            "auto needs a stage that trains with alignment.training.session",
            where=f"{where}.micro_batch_tokens",
            remedy="set a number",
        )
    free_unused()
    if spec.sharding.by_deepspeed:
        load_whole_again()
    return choice


def _numbered(spec: StageSpec, tokens: int) -> StageSpec:
    return replace(spec, config=with_tokens(spec.config, tokens))


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    before: tuple[Any, Any] = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])
