"""Python imports this at its start where ``python -m tests.simulated_device`` put the folder on its path."""

from tests.simulated_device.imports import simulate

simulate()
