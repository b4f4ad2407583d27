"""Weights out: Megatron shards -> HF-named tensors -> servers."""
