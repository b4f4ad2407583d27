"""One MegatronModel with its optimizer and schedule to and from a folder, by Megatron's dist_checkpointing.

The folder can be loaded with any tp, pp and dp. What stock megatron-core 0.16 needs for torch's AdamW, which stands
in for the fused one where Transformer Engine and apex are missing, is done on the optimizer's own objects:
a state before anything is saved or loaded, `step` among the loaded tensors, and a `step` of its own for every parameter.
"""

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_jackpot.hf_folder import copy_other_files
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.versions import asynchronous_save

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class PendingSave:
    """A save whose collective part is done: `write` in any thread, then `finish` on every rank."""

    def __init__(self, request: Any, *, copy: bool) -> None:
        """`copy` takes the tensors off the training's memory, so that training may go on before they are written."""
        self.request = request
        self.buckets = []
        if request.async_fn is not None:
            _, buckets, self.results = request.async_fn_args
            self.buckets = [
                (path, key, (texts, _on_host(tensors, copy))) for path, key, (texts, tensors) in buckets
            ]

    def write(self) -> list[Path]:
        """Write this rank's files, in this process: Megatron's own forked writers are waited for without a limit."""
        if not self.buckets:
            return []
        transforms, _use_msc = self.request.async_fn.args
        written: dict[int, Any] = {}
        for index, bucket in enumerate(self.buckets):
            answer, marks = queue.Queue(), queue.Queue()
            marks.put(index)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answer, marks, use_fsync=True
            )
            _, outcome = answer.get_nowait()
            if isinstance(outcome, BaseException):
                raise outcome
            written[index] = outcome
        self.results.put(written)
        paths = [Path(path) for path, _, _ in self.buckets]
        self.buckets = []
        return paths

    def finish(self) -> None:
        """Write the folder's metadata; every rank calls it, after `write` has returned on all of them."""
        for finalize in self.request.finalize_fns:
            finalize()


def begin_save(model: MegatronModel, folder: Path, *, copy: bool) -> PendingSave:
    """Plan the save of weights and optimizer state; every rank calls it, `folder` exists and is empty."""
    # A queue in this process: Megatron would start a manager process only to pass one message to itself.
    filesystem_async._results_queue = queue.Queue()
    model.reload()
    _give_state(model.optimizer)
    with torch.no_grad(), model.fresh_parameters():
        request = dist_checkpointing.save(_sharded(model, loading=False), str(folder), **asynchronous_save())
        pending = PendingSave(request, copy=copy)
    if model.mesh.is_main and model.folder is not None:
        # The folder is a model by itself then: for tools/megatron_to_hf.py, and as policy.hf or actor.hf of a run.
        copy_other_files(model.folder, folder)
    return pending


def _on_host(tensors: list[tuple[Any, torch.Tensor]], copy: bool) -> list[tuple[Any, torch.Tensor]]:
    return [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in tensors]


def load_model(model: MegatronModel, folder: Path) -> None:
    """Continue from what a finished save wrote, on any layout; every rank calls it."""
    model.reload()
    _give_state(model.optimizer)
    with torch.no_grad(), model.fresh_parameters():
        loaded = dist_checkpointing.load(_sharded(model, loading=True), str(folder))
        for index, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"])
    with torch.no_grad(), _step_among_the_tensors(model.optimizer):
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


def _give_state(optimizer: Any) -> None:
    """An optimizer that has not stepped yet gets the state it starts from; Megatron can save and load no empty one."""
    for part in _parts(optimizer):
        if part.optimizer.state or not hasattr(part, "_init_optimizer_states_with_dummy_values"):
            continue
        groups = part.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0  # Megatron makes the state by a step on zero gradients: it must move nothing.
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:
                group["step"] = 0
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
