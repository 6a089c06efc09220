"""Private names of other libraries whose loss no other test would show at once: methods that ours replace, attributes
that ours set or only look for, and arithmetic. An upgrade then says which contract broke. A private name that is called
fails in the tests of its caller, and stands in no table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
import trl
from accelerate.state import GradientState

import alignment

PACKAGE = Path(alignment.__file__).parent


def has(owner: type, name: str, *parameters: str) -> bool:
    return set(parameters) <= set(inspect.signature(getattr(owner, name)).parameters)


def sets(cls: type, name: str) -> bool:
    """Whether the constructor of a class gives itself such an attribute."""
    return any(f"self.{name} = " in inspect.getsource(base.__init__) for base in cls.__mro__[:-1])


def says(package: str, file: str, text: str) -> bool:
    """Whether a file of an installed package, which takes long to import, holds a text."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return text in (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def softmax_backward_is_right() -> bool:
    scores = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, -1.0]])
    weights = scores.softmax(-1)
    weights.backward(upstream)
    return torch.allclose(torch._softmax_backward_data(upstream, weights.detach(), -1, torch.float32), scores.grad)


def fused_norm_is_right() -> bool:
    states = torch.tensor([[0.5, -1.0, 2.0]])
    normed, _ = torch.ops.aten._fused_rms_norm(states, [3], None, 0.25)
    return torch.allclose(normed, states * (states.square().mean() + 0.25).rsqrt())


TRAINER, TOKENIZER = transformers.Trainer, transformers.PreTrainedTokenizerFast
LORA = peft.tuners.lora.Linear
PARALLEL = torch.nn.parallel.DistributedDataParallel
CONTRACTS: dict[str, tuple[str, Callable[[], bool]]] = {
    "_softmax_backward_data": ("torch", softmax_backward_is_right),
    "_fused_rms_norm": ("torch", fused_norm_is_right),
    "_apply": ("torch", lambda: has(torch.nn.Module, "_apply", "fn", "recurse")),
    "_ddp_params_and_buffers_to_ignore": (
        "torch",
        lambda: "_ddp_params_and_buffers_to_ignore" in inspect.getsource(PARALLEL),
    ),
    "_attn_implementation": ("transformers", lambda: transformers.LlamaConfig()._attn_implementation is not False),
    "_supports_attention_backend": ("transformers", lambda: transformers.LlamaForCausalLM._supports_attention_backend),
    "_save": ("transformers", lambda: has(TRAINER, "_save", "output_dir", "state_dict")),
    "_load_from_checkpoint": (
        "transformers",
        lambda: has(TRAINER, "_load_from_checkpoint", "resume_from_checkpoint", "model"),
    ),
    "_move_model_to_device": ("transformers", lambda: has(TRAINER, "_move_model_to_device", "model", "device")),
    "_get_grad_norm": ("transformers", lambda: has(TRAINER, "_get_grad_norm", "model", "grad_norm")),
    "_encode_plus": ("transformers", lambda: has(TOKENIZER, "_encode_plus", "text", "split_special_tokens")),
    "_compute_loss": ("trl", lambda: has(trl.DPOTrainer, "_compute_loss", "model", "inputs", "return_outputs")),
    "_prepare_dataset": ("trl", lambda: has(trl.DPOTrainer, "_prepare_dataset", "dataset")),
    "_precompute_ref_logps": ("trl", lambda: has(trl.DPOTrainer, "_precompute_ref_logps", "dataset")),
    "_compute_kl_logps": ("trl", lambda: has(trl.KTOTrainer, "_compute_kl_logps", "model", "batch")),
    "_total_train_tokens": ("trl", lambda: sets(trl.DPOTrainer, "_total_train_tokens")),
    "hash_module": ("trl", lambda: says("trl", "trainer/dpo_trainer.py", "hash_module(self.ref_model or self.model)")),
    "_fingerprint": ("datasets", lambda: isinstance(datasets.Dataset.from_dict({})._fingerprint, str)),
    "_disable_adapters": ("peft", lambda: "_disable_adapters" in inspect.getsource(LORA.__mro__[2])),
    "adapter_state_dict_load_map": (
        "peft",
        lambda: hasattr(peft.utils.ModulesToSaveWrapper, "adapter_state_dict_load_map"),
    ),
    "_set_sync_gradients": ("accelerate", lambda: has(GradientState, "_set_sync_gradients", "sync_gradients")),
    "__compatible_ops__": ("deepspeed", lambda: says("deepspeed", "ops/__init__.py", "__compatible_ops__")),
    "ds_id": ("deepspeed", lambda: says("deepspeed", "runtime/zero/partition_parameters.py", ".ds_id = ")),
    "ds_shape": ("deepspeed", lambda: says("deepspeed", "runtime/zero/partition_parameters.py", ".ds_shape = ")),
    "_loglikelihood_tokens": (
        "lm_eval",
        lambda: says("lm_eval", "api/model.py", "self._loglikelihood_tokens(new_reqs, disable_tqdm=disable_tqdm)"),
    ),
    "_log_artifact": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "def _log_artifact(")),
    "is_user_created": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "is_user_created: bool = False")),
    "use_after_commit": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "use_after_commit: bool = False")),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_private_name_is_what_we_take_it_for(name: str) -> None:
    library, holds = CONTRACTS[name]
    users = [path.name for path in sorted(PACKAGE.rglob("*.py")) if name in path.read_text(encoding="utf-8")]
    assert users, "nothing uses it any more"
    assert holds(), f"{library} {importlib.metadata.version(library)} has another {name} than {users} expect"
