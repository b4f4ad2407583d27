"""torch.distributed and Megatron's process groups from the `parallel` section of the configuration."""

import datetime
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_jackpot.config import Parallel
from megatron_jackpot.parallel.context import Mesh


def init_mesh(parallel: Parallel, seed: int) -> Mesh:
    """Join the process group that torchrun (or one process alone) describes and build the (tp, pp, dp) mesh.

    Raises ValueError when tp x pp does not divide the number of ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = parallel.tp * parallel.pp * parallel.cp
    if world % model:
        raise ValueError(
            f"parallel.tp * parallel.pp * parallel.cp = {parallel.tp} * {parallel.pp} * {parallel.cp} = "
            f"{model} "
            f"does not divide the {world} ranks of this job. Start a multiple of {model} ranks."
        )
    device = _device()
    if device.type == "cpu":
        # From the configuration, not from the machine or its load: the order of sums depends on it.
        torch.set_num_threads(parallel.threads)
    if not dist.is_initialized():
        _init_process_group(world, parallel.timeout_s)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, round(parallel.timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Mesh(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_group=parallel_state.get_model_parallel_group(),
        device=device,
    )


def destroy_mesh() -> None:
    """Leave all groups, so that another mesh can be built in this process."""
    parallel_state.destroy_model_parallel()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _init_process_group(world: int, timeout_s: float) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if world == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
