"""One MegatronModel with its optimizer and schedule to and from a folder, by Megatron's dist_checkpointing.

The folder can be loaded with any tp, pp and dp. What stock megatron-core 0.16 needs for torch's AdamW, which
stands in for the fused one where Transformer Engine and apex are missing, is done on the optimizer's own
objects:
a state before anything is saved or loaded, `step` among the loaded tensors, and a `step` of its own for every
parameter.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp

from megatron_jackpot.config.model_folder import copy_other_files
from megatron_jackpot.models.build import plain
from megatron_jackpot.models.dist_folder import BACKEND
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.host_copy import HostCopy
from megatron_jackpot.models.pickles import COMMON, check_pickles
from megatron_jackpot.parallel.reduce import raise_on_all_ranks

FULLY_RESHARDABLE = "fully_reshardable"
RESHARDABLE = {"distrib_optim_sharding_type": FULLY_RESHARDABLE, "chained_optim_avoid_prefix": True}
GATHERED_ON_HOST = {**RESHARDABLE, "distrib_optim_fully_reshardable_mem_efficient": True}


class Snapshot:
    """A model, and its optimizer where it has one, as they were at the last `take`, in host memory that every
    `take` reuses.

    `take` belongs to training and copies what this rank holds itself, without a collective (but for weights
    that an overlapped gather has not brought yet). `write` may run in any thread while training goes on: its
    collectives are on the gloo group it is given and on Megatron's gloo group over data parallel, which
    training never uses.
    """

    def __init__(self, model: MegatronModel) -> None:
        self.model = model
        self._memory = HostCopy()
        if model.optimizer is not None:
            _give_state(model.optimizer)
        self.take()

    def take(self) -> None:
        """Copy the state as it is now; the one before must have been written. Every rank calls it."""
        with torch.no_grad(), self.model.fresh_parameters():
            self._weights = _weights(self.model)
            self._whole = None
            if self.model.optimizer is None:
                entries, shards = _entries(self._weights), []
            elif self.model.ddp_config.use_distributed_optimizer:
                entries = _entries(self._weights)
                shards = [_Shards(part) for part in _parts(self.model.optimizer)]
            else:
                self._whole = self.model.optimizer.sharded_state_dict(self._weights, is_loading=False)
                dict_list_map_inplace(_unshared, self._whole)
                entries, shards = [*_entries(self._weights), *_entries(self._whole)], []
            wanted = [plain(entry.data) for entry in entries]
            wanted += [tensor for part in shards for tensor in part.tensors]
            copies = iter(self._memory.take(wanted))
        self._entries = [(entry, next(copies)) for entry in entries]
        for part in shards:
            part.tensors = [next(copies) for _ in part.tensors]
        self._shards = shards

    def write(self, folder: Path, group: ProcessGroup) -> None:
        """Write what was taken, once, into an empty folder that any tp, pp and dp can load; every rank calls
        it.

        `group` holds all ranks. What fails on one rank (a full disk, say) raises OSError or
        CheckpointException on all.
        """
        with torch.no_grad(), raise_on_all_ranks(group):
            tensors, common = self._prepare()
        dcp.save(
            tensors,
            storage_writer=_Writer(folder, thread_count=1, per_thread_copy_ahead=0),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )
        with raise_on_all_ranks(group):
            if self.model.mesh.is_main:
                torch.save(common, folder / COMMON)
                save_config(BACKEND, str(folder))
                if self.model.folder is not None:
                    # The folder is a model by itself then: for tools/megatron_to_hf.py, and as policy.hf or
                    # actor.hf.
                    copy_other_files(self.model.folder, folder)

    def _prepare(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what this rank writes, what the main rank writes beside it): Megatron's own two parts of a
        state."""
        parts = [shards.gathered(self._weights) for shards in self._shards]
        optimizer: Any = parts[0] if len(parts) == 1 else dict(enumerate(parts)) if parts else self._whole
        learned = {} if optimizer is None else {"optimizer": optimizer}
        for entry, copied in self._entries:
            entry.data = copied
        sharded, common = save_preprocess({**self._weights, **learned}, False)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        return mcore_to_pyt_state_dict(by_key), common


class _Writer(dcp.FileSystemWriter):
    """torch's writer (with one thread: an error in another would be lost), whose errors name the file
    system's own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # The other ranks hear of it pickled, without what lies behind it.
            raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """The OSError that torch's zip writer hides behind one of its own."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error


class _Shards:
    """This rank's shards of one distributed optimizer, and the optimizer's way to put those of all ranks
    together."""

    def __init__(self, part: Any) -> None:
        self.part, self.state = part, copy.deepcopy(part.state_dict())
        self._names: list[tuple[Any, str]] = []
        self.tensors: list[torch.Tensor] = []
        for parameter in part.model_param_group_index_map:
            for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                if name != "step":  # It is in `state`.
                    self._names.append((parameter, name))
                    self.tensors.append(tensor.detach())

    def gathered(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's part of a checkpoint, on the first data-parallel rank; every rank calls it."""
        by_parameter: dict[Any, dict[str, torch.Tensor]] = {}
        for (parameter, name), tensor in zip(self._names, self.tensors, strict=True):
            by_parameter.setdefault(parameter, {})[name] = tensor
        # Megatron's own method, on an optimizer that holds the copies.
        double = copy.copy(self.part)
        double._get_main_param_and_optimizer_states = by_parameter.__getitem__
        state = double.sharded_param_state_fully_reshardable(weights, False, GATHERED_ON_HOST)
        return {**self.state, "param_state": state, "param_state_sharding_type": FULLY_RESHARDABLE}


def _weights(model: MegatronModel) -> dict[str, Any]:
    # What never learns is not wrapped.
    modules = [getattr(chunk, "module", chunk) for chunk in model.chunks]
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(modules)}


def _entries(state: dict[str, Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    """Those that this rank writes, of which another may hold the same."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return [e for e in nested_values(state) if isinstance(e, kinds) and is_main_replica(e.replica_id)]


def _unshared(value: Any) -> Any:
    """A bare tensor (the number of steps) in memory of its own; it is too small to matter."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def load_frozen(model: MegatronModel, folder: Path) -> None:
    """The weights that a finished save wrote of a model that never learns, on any layout; every rank calls
    it."""
    with torch.no_grad():
        check_pickles(folder)
        loaded = dist_checkpointing.load(_weights(model), str(folder))
        for index, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded[f"model{index}"])


def load_model(model: MegatronModel, folder: Path) -> None:
    """Continue from what a finished save wrote, on any layout; every rank calls it.

    The optimizer keeps the settings it was made with, in place of those that the folder holds.
    """
    model.reload()
    _give_state(model.optimizer)
    settings = [_settings(part) for part in _parts(model.optimizer)]
    with torch.no_grad(), model.fresh_parameters():
        check_pickles(folder)
        loaded = dist_checkpointing.load(_to_load(model), str(folder))
        for index, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"])
    with torch.no_grad(), _step_among_the_tensors(model.optimizer):
        model.optimizer.load_state_dict(loaded["optimizer"])
    for part, own in zip(_parts(model.optimizer), settings, strict=True):
        for group, values in zip(part.optimizer.param_groups, own, strict=True):
            group.update(values)
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


def changed_settings(model: MegatronModel, before: dict[str, Any]) -> list[str]:
    """A line for each setting of the optimizer that is another one than in `before`, a checkpoint's."""
    now, lines = model.optimizer_settings, []
    for name in sorted(now.keys() & before.keys()):
        if now[name] == before[name]:
            continue
        if name != "total_steps":
            was = f"the checkpoint was made with {before[name]}"
            lines.append(f"{model.name}.optimizer.{name} = {now[name]} from here on, {was}.")
        elif now["decay"] != "constant":
            lines.append(
                f"run.steps x algorithm.num_minibatches = {now[name]}, and was {before[name]}: the "
                f"{now['decay']} decay of {model.name}'s learning rate ends there now, and the rate moves."
            )
    return lines


def _settings(part: Any) -> list[dict[str, Any]]:
    """What every group of parameters was made with, without the parameters and where training stands."""
    state = ("params", "step")
    return [{k: v for k, v in group.items() if k not in state} for group in part.optimizer.param_groups]


def _to_load(model: MegatronModel) -> dict[str, Any]:
    weights = _weights(model)
    more = {"metadata": RESHARDABLE} if model.ddp_config.use_distributed_optimizer else {}
    return {**weights, "optimizer": model.optimizer.sharded_state_dict(weights, is_loading=True, **more)}


def _give_state(optimizer: Any) -> None:
    """An optimizer that has not stepped yet gets the state it starts from; Megatron can save and load no
    empty one."""
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
    """Within, loading a parameter's state keeps the `step` that the checkpoint does not hold per
    parameter."""
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
