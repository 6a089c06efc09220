"""Faults of weights that stay mapped until they are cut into shares."""

from __future__ import annotations

from tests.mutations.mutation import in_file

MAPPED, LOADING = "unit/models/test_mapped.py", "distributed/test_sharded_loading.py"
CALLS, COPIES = (
    "test_calls_compute_with_copies_and_leave_nothing",
    "test_copies_are_what_is_loaded_otherwise",
)
REFERENCE = "test_a_frozen_copy_stays_in_the_file_and_becomes_what_it_is_otherwise"
HOLDS = "test_a_process_holds_its_shares_and_one_module"

MUTATIONS = [
    *in_file(
        "models/assembly/mapped.py",
        MAPPED,
        (
            "a copy has the file's format",
            "parameter.data = parameter.data.to(getattr(parameter, _DTYPE), copy=True)",
            "parameter.data = parameter.data.clone()",
            COPIES,
        ),
        (
            "a copy in the file's format is the file's memory",
            "parameter.data = parameter.data.to(getattr(parameter, _DTYPE), copy=True)",
            "parameter.data = parameter.data.to(getattr(parameter, _DTYPE))",
            "test_a_copy_that_has_the_files_dtype_has_its_own_memory",
        ),
        (
            "copies stay after a call",
            "            parameter.data = _unread(parameter, self._device)",
            "            pass",
            CALLS,
        ),
        ("the file's weights are lost", "parameter.data = files[id(parameter)]", "pass", CALLS),
        ("autocast keeps copies of trained weights", "parameter.requires_grad_(False)", "pass", CALLS),
        ("trained weights stay frozen", "parameter.requires_grad_(True)", "pass", CALLS),
        (
            "a reference's copies are the policy's",
            "memo[id(parameter)] = nn.Parameter(",
            "_ = nn.Parameter(",
            REFERENCE,
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        MAPPED,
        (
            "weights in several formats are mapped",
            "if len(formats) == 1 else None",
            "if formats else None",
            "test_weights_in_several_formats_are_loaded_as_always",
        ),
        ("a reference is in float32", "convert(module, products)", "convert(module, torch.float32)", REFERENCE),
    ),
    *in_file(
        "stages/shared/initial.py",
        LOADING,
        (
            "weights are converted when they are loaded",
            "sharded = context.spec.sharding.of_weights",
            "sharded = False",
            f"{HOLDS}[sft-full-fsdp]",
        ),
    ),
    *in_file(
        "training/cutting.py",
        LOADING,
        (
            "ZeRO cuts whole copies",
            "            copy_weights([parameter])",
            "            copy_weights(model.parameters())",
            f"{HOLDS}[sft-full-zero3]",
        ),
        (
            "FSDP cuts whole copies",
            "fsdp.fully_shard = _copying_before(cut)",
            "copy_weights(model.parameters())",
            f"{HOLDS}[sft-full-fsdp]",
        ),
        (
            "frozen weights are written into the file's pages",
            "parameter.data = parameter.data.clone()",
            "pass",
            f"{HOLDS}[sft-lora-zero3]",
        ),
    ),
    *in_file(
        "stages/shared/start_reference.py",
        LOADING,
        (
            "a reference is whole until its trainer cuts it",
            "    cut_frozen(reference, context)",
            "    copy_weights(reference.parameters())",
            f"{HOLDS}[dpo-full-fsdp]",
        ),
    ),
    *in_file(
        "training/callbacks.py",
        "unit/training/test_callbacks.py",
        (
            "whole weights pass for shares",
            "if self._sharding.of_weights and not is_sharded(model):",
            "if False:",
            "test_a_launch_that_shards_weights_ends_if_they_are_whole",
        ),
    ),
]
