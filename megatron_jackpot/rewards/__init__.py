"""Rewards: one module each, with `score(response_text, label)` and `check(label)`."""
