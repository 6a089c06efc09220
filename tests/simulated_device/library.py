"""The device's library: loaded before torch is imported, and asked about devices, seeds and events afterwards."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from tests.simulated_device import DEVICES, OPERATORS
from tests.simulated_device.build import built
from tests.simulated_device.events import count

_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_longlong)


class Library:
    def __init__(self) -> None:
        path, operators = built()
        os.environ[OPERATORS] = str(operators)
        # Autograd's thread of the device must not be ended after Python, whose lock it would wait for.
        os.environ.setdefault("TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT", "0")
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.simulated_state_bytes.restype = ctypes.c_longlong
        self._library.simulated_seed.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
        self._listener = _LISTENER(_counted)

    @property
    def devices(self) -> int:
        return int(os.environ.get(DEVICES, "1"))

    def listen(self) -> Callable[[], None]:
        self._library.simulated_listen(self._listener)
        return lambda: self._library.simulated_listen(ctypes.cast(None, _LISTENER))

    def current_device(self) -> int:
        return int(self._library.simulated_current_device())

    def set_device(self, index: int) -> None:
        if index >= 0:
            self._library.simulated_set_device(index)

    def replace_collectives(self) -> None:
        self._library.simulated_replace_collectives()

    def seed(self, index: int, seed: int) -> None:
        self._library.simulated_seed(index, seed & 0xFFFF_FFFF_FFFF_FFFF)

    def state(self, index: int) -> bytes:
        buffer = ctypes.create_string_buffer(self._library.simulated_state_bytes())
        self._library.simulated_get_state(index, buffer)
        return buffer.raw

    def set_state(self, index: int, state: bytes) -> None:
        self._library.simulated_set_state(index, state, ctypes.c_longlong(len(state)))


def _counted(kind: bytes, event: bytes, _: int) -> None:
    count(kind.decode(), event.decode())
