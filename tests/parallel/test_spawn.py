"""The helper that starts ranks: errors come with their traceback, whatever hangs is ended."""

import multiprocessing
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.spawn import run_ranks


def _fail_on_rank_one(rank, world):
    if rank == 1:
        raise ArithmeticError("the reason")
    dist.barrier()


def _hang(rank, world):
    time.sleep(1000)


def _compiler(rank, world):
    return "torch._inductor.compile_fx" in sys.modules, torch.compile.__module__


def test_a_rank_without_cuda_has_megatron_but_not_its_compiler_and_torch_is_as_it_was():
    """Importing it takes every rank seconds at its start."""
    assert run_ranks(_compiler, 1, 60) == [(torch.cuda.is_available(), "torch")]


def test_an_error_on_one_rank_ends_all_and_shows_its_traceback():
    with pytest.raises(
        RuntimeError, match="(?s)_fail_on_rank_one failed on rank 1.*ArithmeticError: the reason"
    ):
        run_ranks(_fail_on_rank_one, 2, 60)
    assert not multiprocessing.active_children()


def test_ranks_that_hang_are_killed_at_the_limit():
    with pytest.raises(TimeoutError, match=r"_hang: ranks \[0, 1\] were still running after 3 s"):
        run_ranks(_hang, 2, 3)
    assert not multiprocessing.active_children()
