"""A CUDA device for a torch that has none, so that tests see where tensors lie and when the host waits for the device.
Memory of the host stands behind the device type CUDA. So branches for CUDA run; tensors, generators and memory of two
devices do not mix; and each wait of the host, and each copy, is counted with the line that asked for it (events.py).
``python -m tests.simulated_device ...`` runs Python with it, child processes included; docs/design/0038 says how. What
it cannot show: nothing runs asynchronously; numbers are those of the CPU's kernels; memory is not limited; the
attention kernel's limits on shapes and dtypes are checked, those of other kernels are not; streams, graphs, NCCL and
Triton do not exist. Sparse and quantised tensors are refused, and so is an operator that CUDA lacks."""

from __future__ import annotations

NAME = "simulated CUDA device"
"""The name of the device, as ``torch.cuda.get_device_name`` gives it."""
DEVICES, OPERATORS = "SIMULATED_DEVICES", "SIMULATED_DEVICE_OPERATORS"
"""Environment variables: how many devices there are (1), and the file that says which operators CUDA has."""
