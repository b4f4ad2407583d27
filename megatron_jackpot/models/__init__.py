"""Megatron-core models: build, score, update. Importing this package adapts Megatron to machines without
CUDA."""

from megatron_jackpot.models import cpu

cpu.install()
