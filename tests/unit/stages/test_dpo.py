"""DPO's reference: computed in each step or beforehand, it is the policy at the start of the stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trl.trainer import dpo_trainer

from alignment.config.adapter import CONTINUE, AdapterConfig, Chain
from alignment.config.model import Dtype
from alignment.stages.dpo import run as dpo
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.shared.initial import initial_policy
from alignment.stages.shared.preference_pairs import read_pairs
from alignment.stages.shared.reference_cache import OwnRows, Reference
from alignment.training.context import StageContext
from tests.chained import LORA, Chained, config_of
from tests.oracles.close import close
from tests.pairs import TokenizedPair, as_pairs, as_table
from tests.tiny import tiny_model


def dropping(chain: Chain) -> AdapterConfig:
    return AdapterConfig(rank=4, dropout=0.5 if chain is Chain.merge else 0.0, chain=chain)


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE], ids=lambda chain: chain.value)
def test_a_precomputed_reference_is_what_the_starting_policy_says_of_every_row(tmp_path: Path, chain: Chain) -> None:
    """Adapters of a stage that trained with dropout arrive in training mode."""
    chained = Chained(tmp_path)
    chained.run("sft", dropping(Chain.merge))
    config = config_of("dpo", dropping(chain), precompute_reference=True)
    assert isinstance(config, DpoConfig)
    context = StageContext(spec=chained.spec("dpo", config.adapter, init="sft", config=config), rank=0, world_size=1)
    policy = chained.policy("sft")
    start, tokenizer = initial_policy(context)
    pairs, _ = read_pairs(config, context, tokenizer)
    trainer = dpo._trainer(config, context, start, tokenizer, pairs)
    dpo.check_start(trainer)
    for side in ("chosen", "rejected"):
        plain = [plain_logprob(policy, pair.prompt, getattr(pair, side)) for pair in as_pairs(pairs)]
        close(trainer.train_dataset[f"ref_{side}_logps"], plain, rtol=1e-4)


def _must_not_hash(*_: object) -> str:
    raise AssertionError("all weights would be read once more")


def test_a_precomputed_reference_reads_the_weights_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_trainer, "hash_module", _must_not_hash)
    chained = Chained(tmp_path)
    chained.run("dpo", LORA, config=config_of("dpo", LORA, precompute_reference=True))
    assert dpo_trainer.hash_module is _must_not_hash, "it is put back"


def test_a_reference_stands_beside_its_own_pair_where_rows_are_drawn() -> None:
    pairs = as_table(TokenizedPair(prompt=[n], chosen=[n, 2], rejected=[n, 3]) for n in range(6)).select([4, 0, 2])
    logprobs = {"chosen": torch.tensor([-4.0, 0.0, -2.0]), "rejected": torch.tensor([4.5, 0.5, 2.5])}
    own = OwnRows(policy=tiny_model(), rows=pairs, dtype=Dtype.float32, tokens=64, rank=0, world_size=1)
    reference = Reference(logprobs=logprobs, file=Path("x"), own=own)
    assert list(dpo._dataset(pairs, reference)) == [
        {
            "prompt_ids": [n], "chosen_ids": [n, 2], "rejected_ids": [n, 3],
            "ref_chosen_logps": -float(n), "ref_rejected_logps": n + 0.5,
        }
        for n in (4, 0, 2)
    ]  # fmt: skip


def plain_logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) from the model's logits, in nats."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logprobs = model(ids).logits[0].double().log_softmax(-1)
    return float(sum(logprobs[position - 1, ids[0, position]] for position in range(len(prompt), ids.shape[1])))
