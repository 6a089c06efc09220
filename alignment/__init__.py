"""SFT, reward model, DPO and PPO as one planned run: a driver plans, workers train, artifacts connect them."""

__version__ = "0.1.0"

import logging

# PEFT imports it, and its first word on some CPUs is that a kernel which nobody asked for cannot be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
