"""What launchers and checkpoints are told of how weights are shared out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignment.config.launch import Offload, Sharding
from alignment.training import context as context_module
from alignment.training.context import StageContext
from alignment.training.sharding import layout, sharding_arguments


def _shared(context: StageContext, sharding: Sharding, offload: Offload = Offload.none) -> StageContext:
    return replace(context, spec=replace(context.spec, sharding=sharding, offload=offload), world_size=2)


def test_a_layout_names_the_processes_and_how_they_share(context: StageContext) -> None:
    assert layout(_shared(context, Sharding.none)) == "whole weights"
    assert layout(_shared(context, Sharding.zero2)) == "shares of 2 processes (zero2)"
    assert layout(_shared(context, Sharding.fsdp)) == "shares of 2 processes (fsdp)"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("offload", [Offload.none, Offload.weights])
def test_fsdp_moves_weights_to_the_host_where_they_are_elsewhere(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, offload: Offload, device: str
) -> None:
    monkeypatch.setattr(context_module, "own_device", lambda: torch.device(device))
    arguments = sharding_arguments(_shared(context, Sharding.fsdp, offload))
    assert arguments["fsdp"] is True
    assert arguments["fsdp_config"]["cpu_offload"] is (offload is Offload.weights and device == "cuda")
