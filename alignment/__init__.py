"""SFT, reward model, DPO and PPO as one planned run: a driver plans, workers train, artifacts connect them."""

__version__ = "0.1.0"
