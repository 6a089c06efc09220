"""``torch.cuda`` of the simulated device: what a torch without CUDA lacks in Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.simulated_device import NAME
from tests.simulated_device.events import WAIT, count, quiet
from tests.simulated_device.library import Library

_MEMORY = 80 << 30
_PROPERTIES = {
    "name": NAME,
    "major": 9,
    "minor": 0,
    "total_memory": _MEMORY,
    "multi_processor_count": 132,
    "uuid": "simulated",
    "gcnArchName": "",
    "warp_size": 32,
    "max_threads_per_multi_processor": 2048,
    "is_integrated": 0,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "L2_cache_size": 50 << 20,
}


def replace_functions(library: Library) -> None:
    functions = {**_facts(library), **_memory(), **_waiting(), **_devices(library), **_random(library)}
    for name, function in functions.items():
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, function)
    torch.cuda.default_generators = tuple(_Generator(library, index) for index in range(library.devices))
    binding: Any = torch._C
    binding._cuda_getDevice = library.current_device
    binding._cuda_getDeviceCount = torch.cuda.device_count
    binding._cuda_setDevice = library.set_device
    binding._cuda_exchangeDevice = binding._cuda_maybeExchangeDevice = _exchange(library)
    binding._cuda_isCurrentStreamCapturing = _always(False)
    binding._cuda_getCurrentRawStream = _always(0)
    torch.version.cuda = "12.8"  # type: ignore[assignment]
    _replace_storage_copy()


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _facts(library: Library) -> dict[str, Any]:
    return {
        "_lazy_init": _always(None),
        "init": _always(None),
        "is_available": _always(True),
        "is_initialized": _always(True),
        "device_count": _always(library.devices),
        "get_device_name": _always(NAME),
        "get_device_properties": _always(SimpleNamespace(**_PROPERTIES)),
        "get_device_capability": _always((9, 0)),
        "get_arch_list": _always(["sm_90"]),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": _always(False),
    }


def _memory() -> dict[str, Any]:
    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    nothing = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "reset_max_memory_allocated")
    return {
        **{name: _always(1 << 20) for name in names},
        **{name: _always(None) for name in nothing},
        "mem_get_info": _always((_MEMORY - (10 << 30), _MEMORY)),
        "memory_stats": _always({}),
    }


def _waiting() -> dict[str, Any]:
    def synchronize(*_: Any, **__: Any) -> None:
        count(WAIT, "torch.cuda.synchronize")

    stream = SimpleNamespace(synchronize=synchronize, wait_stream=_always(None), cuda_stream=0)
    return {"synchronize": synchronize, "current_stream": _always(stream), "default_stream": _always(stream)}


def _index(device: Any) -> int:
    if device is None:
        return -1
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return -1 if index is None else index


def _exchange(library: Library) -> Callable[[int], int]:
    def exchange(index: int) -> int:
        before = library.current_device()
        library.set_device(index)
        return before

    return exchange


def _devices(library: Library) -> dict[str, Any]:
    exchange = _exchange(library)

    @contextlib.contextmanager
    def device(chosen: Any) -> Iterator[None]:
        before = exchange(_index(chosen))
        try:
            yield
        finally:
            library.set_device(before)

    def device_of(tensor: Tensor) -> Any:
        return device(tensor.device if tensor.is_cuda else None)

    return {
        "current_device": library.current_device,
        "set_device": lambda chosen: library.set_device(_index(chosen)),
        "device": device,
        "device_of": device_of,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
    }


class _Generator:
    def __init__(self, library: Library, index: int) -> None:
        self._library = library
        self._index = index
        self._seed = 0

    def manual_seed(self, seed: int) -> _Generator:
        self._library.seed(self._index, int(seed))
        self._seed = int(seed)
        return self

    def initial_seed(self) -> int:
        return self._seed

    def get_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self._library.state(self._index)), dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        assert state.device.type == "cpu", "a state is a tensor of the CPU"
        assert state.dtype is torch.uint8
        self._library.set_state(self._index, state.contiguous().numpy().tobytes())


def _random(library: Library) -> dict[str, Any]:
    def generator(device: Any = "cuda") -> _Generator:
        index = _index(device)
        own: _Generator = torch.cuda.default_generators[library.current_device() if index < 0 else index]
        return own

    def seed_all(seed: int) -> None:
        for own in torch.cuda.default_generators:
            own.manual_seed(seed)

    def set_states(states: Sequence[Tensor]) -> None:
        for own, state in zip(torch.cuda.default_generators, states, strict=True):
            own.set_state(state)

    return {
        "manual_seed": lambda seed: generator().manual_seed(seed),
        "manual_seed_all": seed_all,
        "get_rng_state": lambda device="cuda": generator(device).get_state(),
        "set_rng_state": lambda state, device="cuda": generator(device).set_state(state),
        "get_rng_state_all": lambda: [own.get_state() for own in torch.cuda.default_generators],
        "set_rng_state_all": set_states,
        "initial_seed": lambda: generator().initial_seed(),
    }


def _replace_storage_copy() -> None:
    storage: Any = torch.storage._StorageBase
    otherwise = storage.clone

    def clone(self: Any) -> Any:
        if self.device.type != "cuda":
            return otherwise(self)
        with quiet():
            held = torch.empty(self.nbytes(), dtype=torch.uint8, device=self.device)
            return held.untyped_storage().copy_(self, False)

    storage.clone = clone


def use_gloo(library: Library) -> None:
    """Several devices: ``init_process_group("nccl")`` makes a group of gloo, which works on the same memory.

    The host waits for it only where it would wait for NCCL; objects travel through memory of the host.
    """
    library.replace_collectives()
    distributed: Any = torch.distributed
    otherwise = distributed.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        otherwise("gloo" if backend == "nccl" else backend, *arguments, **options)

    def all_gather_into_tensor(output: Tensor, own: Tensor, group: Any = None, async_op: bool = False) -> Any:
        parts = output.view(-1, *own.shape).unbind(0)
        return distributed.all_gather(list(parts), own, group=group, async_op=async_op)

    distributed.is_nccl_available = lambda: True
    distributed.all_gather_into_tensor = all_gather_into_tensor
    distributed.init_process_group = init_process_group
