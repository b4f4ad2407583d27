"""One MegatronModel with its optimizer and schedule to and from a folder, by Megatron's dist_checkpointing.

The folder can be loaded with any tp, pp and dp. What stock megatron-core 0.16 needs for torch's AdamW, which stands
in for the fused one where Transformer Engine and apex are missing, is done on the optimizer's own objects:
a state before anything is loaded, `step` among the loaded tensors, and a `step` of its own for every parameter.
"""

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_jackpot.hf_folder import copy_other_files
from megatron_jackpot.models.engine import MegatronModel

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_model(model: MegatronModel, folder: Path) -> None:
    """Write weights and optimizer state; every rank calls it, `folder` exists and is empty."""
    # A queue in this process: Megatron would start a manager process only to pass one message to itself.
    filesystem_async._results_queue = queue.Queue()
    _make_states(model.optimizer)
    with torch.no_grad(), model.fresh_parameters():
        dist_checkpointing.save(_sharded(model, loading=False), str(folder))
    if model.mesh.is_main and model.folder is not None:
        # The folder is a model by itself then: for tools/megatron_to_hf.py, and as policy.hf or actor.hf of a run.
        copy_other_files(model.folder, folder)


def load_model(model: MegatronModel, folder: Path) -> None:
    """Continue from what `save_model` wrote, on any layout; every rank calls it."""
    _make_states(model.optimizer)
    with torch.no_grad(), model.fresh_parameters():
        loaded = dist_checkpointing.load(_sharded(model, loading=True), str(folder))
        for index, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"])
    with _step_among_the_tensors(model.optimizer):
        model.optimizer.load_state_dict(loaded["optimizer"])
    for part in _parts(model.optimizer):
        for state in part.optimizer.state.values():
            # Megatron gives all parameters one tensor, which AdamW would then advance once for each of them.
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def schedule_state(model: MegatronModel) -> int:
    """Optimizer steps that the learning-rate schedule has seen."""
    return int(model.scheduler.num_steps)


def load_schedule(model: MegatronModel, num_steps: int) -> None:
    model.scheduler.num_steps = 0
    model.scheduler.step(num_steps)


def _sharded(model: MegatronModel, *, loading: bool) -> dict[str, Any]:
    weights = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(model.chunks)}
    knobs = {"metadata": RESHARDABLE} if model.ddp_config.use_distributed_optimizer else {}
    optimizer = model.optimizer.sharded_state_dict(weights, is_loading=loading, **knobs)
    return {**weights, "optimizer": optimizer}


def _make_states(optimizer: Any) -> None:
    """Give an optimizer that has not stepped, as a frozen model's never does, the state of one about to: zeros."""
    for part in _parts(optimizer):
        if part.optimizer.state or not hasattr(part, "_init_optimizer_states_with_dummy_values"):
            continue
        groups = part.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = (
                0.0  # Megatron's way is a step without gradients, which would still decay the weights
            )
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


@contextlib.contextmanager
def _step_among_the_tensors(optimizer: Any) -> Iterator[None]:
    """Within, loading a parameter's state keeps the `step` that the checkpoint does not hold per parameter."""
    parts = [p for p in _parts(optimizer) if hasattr(p, "_set_main_param_and_optimizer_states")]
    for part in parts:
        part._set_main_param_and_optimizer_states = _with_step(part)
    yield
    for part in parts:
        del part._set_main_param_and_optimizer_states


def _with_step(part: Any) -> Any:
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        original(model_param, {k: state[k] for k in ("step",) if k in state} | tensors)

    return set_states
