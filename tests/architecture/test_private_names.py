"""Every private name of another library that we use, and what it must be: an upgrade then says which contract broke.

A name that is new in our source has to be added to the table; one that is gone from it, taken out.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import psutil
import pytest
import torch
import transformers
import trl
from accelerate.state import GradientState
from peft.tuners.lora import Linear as LoraLinear
from torch.distributed.fsdp import FSDPModule

import alignment

PACKAGE = Path(alignment.__file__).parent
PUBLIC_DUNDERS = {"__name__", "__qualname__", "__module__", "__class__", "__init__", "__traceback__", "__file__"}
KNOWN = {"alignment", *sys.stdlib_module_names}
PUBLIC_DUNDERS |= {
    "_replace",
    "__metadata__",
    "__setattr__",
    "__cause__",
    "__context__",
    "__future__",
    "__version__",
    "__func__",
    "__code__",
    "__mro__",
    "__dict__",
}


# ---- what the source uses -------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    """Of a class, module or object; the dunders of the language are not."""
    return name.startswith("_") and name != "_" and name not in PUBLIC_DUNDERS


def ours(trees: list[ast.Module]) -> set[str]:
    """Names that our own source gives to functions, classes, fields and variables."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def used(tree: ast.Module) -> Iterator[str]:
    """Private names behind a dot, in a ``getattr`` and in an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield str(ast.literal_eval(node.args[1])) if isinstance(node.args[1], ast.Constant) else ""
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("alignment"):
            yield from (*(node.module or "").split("."), *(alias.name for alias in node.names))


def overridden() -> Iterator[str]:
    """Private methods of another library's class that one of ours replaces."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "alignment."):
        imported = importlib.import_module(module.name)
        for cls in vars(imported).values():
            if isinstance(cls, type) and cls.__module__.startswith("alignment."):
                foreign = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in KNOWN]
                own = [base for base in cls.__mro__ if base.__module__.startswith("alignment.")]  # mixins as well
                methods = [name for base in own for name, held in vars(base).items() if inspect.isfunction(held)]
                yield from (name for name in methods for base in foreign if name in vars(base))


def private_names() -> set[str]:
    """All that the package uses or overrides."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    foreign = {name for tree in trees for name in used(tree)} - ours(trees)
    replaced = {name for name in overridden() if not (name.startswith("__") and name.endswith("__"))}
    return {name for name in foreign | replaced if is_private(name)}


# ---- what each of them must be --------------------------------------------------------------------------------------


def has(owner: Any, name: str, *parameters: str) -> bool:
    """Whether it is there, and takes these parameters if any are named."""
    attribute = getattr(owner, name, None)
    return attribute is not None and set(parameters) <= set(
        inspect.signature(attribute).parameters if parameters else ()
    )


def sets(cls: type, name: str) -> bool:
    """Whether the constructor of a class gives itself such an attribute."""
    return any(f"self.{name} = " in inspect.getsource(base.__init__) for base in cls.__mro__[:-1])


def says(package: str, file: str, text: str) -> bool:
    """Whether a file of an installed package, which takes long to import, holds a text."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return text in (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def lora_layer() -> Any:
    return LoraLinear(torch.nn.Linear(2, 2), "default", config=peft.LoraConfig(r=1), r=1)


def hydra_files() -> Any:
    return importlib.import_module("hydra._internal.core_plugins.file_config_source").FileConfigSource


def fsdp_state() -> Any:
    return inspect.get_annotations(FSDPModule._get_fsdp_state, eval_str=True)["return"]


def http_client() -> Any:
    return pytest.importorskip("openai").DefaultHttpxClient()


def op(name: str) -> bool:
    """An operator of oneDNN, which torch may be built without."""
    return not torch.backends.mkldnn.is_available() or hasattr(torch.ops.mkldnn, name)


LAYER, CONFIG = torch.nn.Linear(1, 1), transformers.LlamaConfig()
LLAMA = transformers.LlamaForCausalLM


def _finalizers_are_listed() -> bool:
    folder = tempfile.TemporaryDirectory()
    is_listed = folder in [(finalizer.peek() or [None])[0] for finalizer in weakref.finalize._registry]  # type: ignore[attr-defined]
    folder.cleanup()
    return is_listed


CONTRACTS: dict[str, tuple[str, Callable[[], bool]]] = {
    # ---- Python
    "_exit": ("Python", lambda: has(os, "_exit")),
    "_run_exitfuncs": ("Python", lambda: has(atexit, "_run_exitfuncs")),
    "_current_frames": ("Python", lambda: has(sys, "_current_frames")),
    # ---- torch
    "_apply": ("torch", lambda: has(torch.nn.Module, "_apply", "fn", "recurse")),
    "_forward_hooks": ("torch", lambda: LAYER._forward_hooks == {}),
    "_forward_pre_hooks": ("torch", lambda: LAYER._forward_pre_hooks == {}),
    "_backward_hooks": ("torch", lambda: LAYER._backward_hooks == {}),
    "_get_fsdp_state": ("torch", lambda: has(FSDPModule, "_get_fsdp_state")),
    "_modules_to_run_forward": ("torch", lambda: fsdp_state()()._modules_to_run_forward == set()),
    "_backward_pre_hooks": ("torch", lambda: LAYER._backward_pre_hooks == {}),
    "_softmax_backward_data": ("torch", lambda: softmax_backward_is_right()),
    "_reorder_linear_weight": ("torch", lambda: op("_reorder_linear_weight")),
    "_linear_pointwise": ("torch", lambda: op("_linear_pointwise")),
    "_is_mkldnn_bf16_supported": ("torch", lambda: op("_is_mkldnn_bf16_supported")),
    "_fused_rms_norm": ("torch", lambda: fused_norm_is_right()),
    "_version": ("torch", lambda: torch.zeros(1).add_(1)._version == 1),
    # ---- transformers
    "_can_set_attn_implementation": ("transformers", lambda: LLAMA._can_set_attn_implementation() is True),
    "_attn_implementation": ("transformers", lambda: CONFIG._attn_implementation is not False),
    "_name_or_path": ("transformers", lambda: CONFIG._name_or_path == ""),
    "_supports_attention_backend": ("transformers", lambda: LLAMA._supports_attention_backend is True),
    "_no_split_modules": ("transformers", lambda: "LlamaDecoderLayer" in LLAMA(tiny())._no_split_modules),
    "_save": ("transformers", lambda: has(transformers.Trainer, "_save", "output_dir", "state_dict")),
    "_load_from_checkpoint": (
        "transformers",
        lambda: has(transformers.Trainer, "_load_from_checkpoint", "resume_from_checkpoint", "model"),
    ),
    "_move_model_to_device": (
        "transformers",
        lambda: has(transformers.Trainer, "_move_model_to_device", "model", "device"),
    ),
    "_encode_plus": (
        "transformers",
        lambda: has(transformers.PreTrainedTokenizerFast, "_encode_plus", "text", "split_special_tokens"),
    ),
    "_get_grad_norm": ("transformers", lambda: has(transformers.Trainer, "_get_grad_norm", "model", "grad_norm")),
    # ---- trl
    "_compute_loss": ("trl", lambda: has(trl.DPOTrainer, "_compute_loss", "model", "inputs", "return_outputs")),
    "_prepare_dataset": ("trl", lambda: has(trl.DPOTrainer, "_prepare_dataset", "dataset")),
    "_precompute_ref_logps": ("trl", lambda: has(trl.DPOTrainer, "_precompute_ref_logps", "dataset")),
    "_compute_kl_logps": ("trl", lambda: has(trl.KTOTrainer, "_compute_kl_logps", "model", "batch")),
    # ---- datasets
    "_fingerprint": ("datasets", lambda: isinstance(datasets.Dataset.from_dict({})._fingerprint, str)),
    # ---- peft
    "_active_adapter": ("peft", lambda: lora_layer()._active_adapter == ["default"]),
    "_disable_adapters": ("peft", lambda: lora_layer()._disable_adapters is False),
    # ---- accelerate
    "_set_sync_gradients": ("accelerate", lambda: has(GradientState, "_set_sync_gradients", "sync_gradients")),
    # ---- torch, for tensors without numbers
    "_init": ("psutil", lambda: psutil.Process()._init(2**22 + 1, _ignore_nsp=True) is None),
    "_registry": ("Python", _finalizers_are_listed),
    "_C": ("torch", lambda: callable(torch._C._disabled_torch_function_impl)),
    "_disabled_torch_function_impl": ("torch", lambda: callable(torch._C._disabled_torch_function_impl)),
    "__get__": ("torch", lambda: hasattr(torch.Tensor.data, "__get__")),
    "__set__": ("torch", lambda: hasattr(torch.Tensor.data, "__set__")),
    "_make_wrapper_subclass": ("torch", lambda: callable(torch.Tensor._make_wrapper_subclass)),
    "_cdata": ("torch", lambda: isinstance(torch.empty(1).untyped_storage()._cdata, int)),
    "_python_dispatch": ("torch", lambda: has(torch.utils._python_dispatch, "TorchDispatchMode")),
    "_disable_current_modes": ("torch", lambda: has(torch.utils._python_dispatch, "_disable_current_modes")),
    "_pytree": ("torch", lambda: has(torch.utils._pytree, "tree_map", "func", "tree")),
    "_parameters": ("torch", lambda: isinstance(torch.nn.Linear(1, 1)._parameters, dict)),
    "_local_scalar_dense": ("torch", lambda: hasattr(torch.ops.aten, "_local_scalar_dense")),
    "_index_put_impl_": ("torch", lambda: hasattr(torch.ops.aten, "_index_put_impl_")),
    "_unsafe_index": ("torch", lambda: hasattr(torch.ops.aten, "_unsafe_index")),
    # ---- hydra
    "_internal": ("hydra-core", lambda: has(hydra_files(), "load_config", "config_path")),
    "_normalize_file_name": ("hydra-core", lambda: has(hydra_files(), "_normalize_file_name", "filename")),
    # ---- openai, whose client is httpx's
    "_mounts": ("openai", lambda: isinstance(http_client()._mounts, dict)),
    "_transport": ("openai", lambda: has(http_client(), "_transport")),
    "_pool": ("openai", lambda: has(http_client()._transport, "_pool")),
    "_network_backend": (
        "openai",
        lambda: has(http_client()._transport._pool._network_backend, "connect_tcp", "host", "port", "timeout"),
    ),
    # ---- deepspeed
    "__compatible_ops__": ("deepspeed", lambda: says("deepspeed", "ops/__init__.py", "__compatible_ops__")),
    # ---- wandb
    "_loglikelihood_tokens": (
        "lm_eval",
        lambda: says("lm_eval", "api/model.py", "self._loglikelihood_tokens(new_reqs, disable_tqdm=disable_tqdm)"),
    ),
    "_log_artifact": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "def _log_artifact(")),
}
UNDOCUMENTED: dict[str, tuple[str, Callable[[], bool]]] = {
    "_total_train_tokens": ("trl", lambda: sets(trl.DPOTrainer, "_total_train_tokens")),
    "_ddp_params_and_buffers_to_ignore": (
        "torch",
        lambda: "_ddp_params_and_buffers_to_ignore" in inspect.getsource(torch.nn.parallel.DistributedDataParallel),
    ),
    "ds_id": ("deepspeed", lambda: says("deepspeed", "runtime/zero/partition_parameters.py", ".ds_id = ")),
    "ds_shape": ("deepspeed", lambda: says("deepspeed", "runtime/zero/partition_parameters.py", ".ds_shape = ")),
    "set_z3_leaf_modules": ("deepspeed", lambda: says("deepspeed", "utils/__init__.py", "set_z3_leaf_modules")),
    "add_hooks": ("trl", lambda: says("trl", "models/utils.py", "def add_hooks(model")),
    "remove_hooks": ("trl", lambda: says("trl", "models/utils.py", "def remove_hooks(model")),
    "adapter_state_dict_load_map": ("peft", lambda: modules_to_save_has("adapter_state_dict_load_map")),
    "hash_module": ("trl", lambda: says("trl", "trainer/dpo_trainer.py", "hash_module(self.ref_model or self.model)")),
    "is_user_created": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "is_user_created: bool = False")),
    "use_after_commit": ("wandb", lambda: says("wandb", "sdk/wandb_run.py", "use_after_commit: bool = False")),
}
"""Without an underscore, and no more promised for that; or with one, and set by us for a library to read."""


def tiny() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )


def modules_to_save_has(name: str) -> bool:
    return hasattr(peft.utils.ModulesToSaveWrapper, name)


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


def test_the_table_names_exactly_what_the_source_uses() -> None:
    assert private_names() == set(CONTRACTS)
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert [name for name in UNDOCUMENTED if name not in text] == []


@pytest.mark.parametrize("name", [*CONTRACTS, *UNDOCUMENTED])
def test_a_private_name_is_what_we_take_it_for(name: str) -> None:
    library, holds = {**CONTRACTS, **UNDOCUMENTED}[name]
    version = sys.version.split()[0] if library == "Python" else importlib.metadata.version(library)
    assert holds(), f"{library} {version} has another {name} than {_users(name)} expects"


def _users(name: str) -> str:
    """The files that name it."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if name in path.read_text(encoding="utf-8")]
    return ", ".join(str(path.relative_to(PACKAGE.parent)) for path in files)
