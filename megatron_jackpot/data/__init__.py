"""Prompts: where they come from, their tokens, and the order in which data-parallel leaders see them."""
