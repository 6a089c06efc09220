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
import pytest
import torch
import transformers
import trl
from accelerate.state import GradientState

import alignment

PACKAGE = Path(alignment.__file__).parent


TRAINER, TOKENIZER = transformers.Trainer, transformers.PreTrainedTokenizerFast
METHODS: dict[str, tuple[type, str]] = {
    "_apply": (torch.nn.Module, "fn recurse"),
    "_save": (TRAINER, "output_dir state_dict"),
    "_load_from_checkpoint": (TRAINER, "resume_from_checkpoint model"),
    "_move_model_to_device": (TRAINER, "model device"),
    "_get_grad_norm": (TRAINER, "model grad_norm"),
    "_encode_plus": (TOKENIZER, "text split_special_tokens"),
    "_compute_loss": (trl.DPOTrainer, "model inputs return_outputs"),
    "_prepare_dataset": (trl.DPOTrainer, "dataset"),
    "_precompute_ref_logps": (trl.DPOTrainer, "dataset"),
    "_compute_kl_logps": (trl.KTOTrainer, "model batch"),
    "_set_sync_gradients": (GradientState, "sync_gradients"),
}
"""Methods that ours replace or call with these parameters."""
TEXTS = {
    "_ddp_params_and_buffers_to_ignore": ("torch", "nn/parallel/distributed.py", "_ddp_params_and_buffers_to_ignore"),
    "_total_train_tokens": ("trl", "trainer/dpo_trainer.py", "self._total_train_tokens = "),
    "hash_module": ("trl", "trainer/dpo_trainer.py", "hash_module(self.ref_model or self.model)"),
    "_disable_adapters": ("peft", "tuners/tuners_utils.py", "_disable_adapters"),
    "adapter_state_dict_load_map": ("peft", "utils/other.py", "adapter_state_dict_load_map"),
    "__compatible_ops__": ("deepspeed", "ops/__init__.py", "__compatible_ops__"),
    "ds_id": ("deepspeed", "runtime/zero/partition_parameters.py", ".ds_id = "),
    "ds_shape": ("deepspeed", "runtime/zero/partition_parameters.py", ".ds_shape = "),
    "_loglikelihood_tokens": (
        "lm_eval",
        "api/model.py",
        "self._loglikelihood_tokens(new_reqs, disable_tqdm=disable_tqdm)",
    ),
    "_log_artifact": ("wandb", "sdk/wandb_run.py", "def _log_artifact("),
    "is_user_created": ("wandb", "sdk/wandb_run.py", "is_user_created: bool = False"),
    "use_after_commit": ("wandb", "sdk/wandb_run.py", "use_after_commit: bool = False"),
}
"""What ours set or look for, in files of packages that take long to import."""
VALUES: dict[str, Callable[[], bool]] = {
    "_attn_implementation": lambda: transformers.LlamaConfig()._attn_implementation is not False,
    "_supports_attention_backend": lambda: transformers.LlamaForCausalLM._supports_attention_backend,
    "_fingerprint": lambda: isinstance(datasets.Dataset.from_dict({})._fingerprint, str),
}


@pytest.mark.parametrize("name", [*METHODS, *TEXTS, *VALUES])
def test_a_private_name_is_what_we_take_it_for(name: str) -> None:
    users = [path.name for path in sorted(PACKAGE.rglob("*.py")) if name in path.read_text(encoding="utf-8")]
    assert users, "nothing uses it any more"
    if name in METHODS:
        owner, parameters = METHODS[name]
        assert set(parameters.split()) <= set(inspect.signature(getattr(owner, name)).parameters)
    elif name in TEXTS:
        package, file, text = TEXTS[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        assert text in (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    else:
        assert VALUES[name]()
