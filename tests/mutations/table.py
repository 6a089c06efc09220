"""All mutations of the wiring. Those of the arithmetic stand in tests/unit/algos/test_mutations.py."""

from __future__ import annotations

from tests.mutations import (
    benchmarks,
    critic_free,
    data,
    distilling,
    driver,
    engines,
    evaluating,
    gguf_files,
    kto,
    longest_batches,
    people,
    pipeline,
    ppo,
    ppo_step,
    preference_losses,
    results,
    sampling,
    scorers,
    serving,
    stages,
    training,
    validation,
)
from tests.mutations.mutation import Mutation

MUTATIONS: list[Mutation] = [
    *training.MUTATIONS,
    *ppo.MUTATIONS,
    *ppo_step.MUTATIONS,
    *critic_free.MUTATIONS,
    *preference_losses.MUTATIONS,
    *stages.MUTATIONS,
    *kto.MUTATIONS,
    *longest_batches.MUTATIONS,
    *distilling.MUTATIONS,
    *validation.MUTATIONS,
    *data.MUTATIONS,
    *evaluating.MUTATIONS,
    *people.MUTATIONS,
    *benchmarks.MUTATIONS,
    *results.MUTATIONS,
    *gguf_files.MUTATIONS,
    *sampling.MUTATIONS,
    *engines.MUTATIONS,
    *scorers.MUTATIONS,
    *pipeline.MUTATIONS,
    *driver.MUTATIONS,
    *serving.MUTATIONS,
]
