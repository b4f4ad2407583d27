"""Prompts to finished groups of rollouts: every prompt once."""
