"""Megatron Jackpot: reinforcement learning from another model's rollouts (arXiv 2602.06107)."""

__version__ = "0.1.0"
