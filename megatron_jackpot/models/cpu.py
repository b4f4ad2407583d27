"""The only place that adapts Megatron-core to a machine without CUDA; `install` does nothing where CUDA
exists.

Three kinds of adaptation to stock megatron-core 0.16: functions of torch.cuda that raise without a driver,
the literals "cuda" inside Megatron's own functions, and what Megatron hands to torch.compile as it is
imported. Its layers of such a machine stand in local_layers.py.
"""

import importlib
import inspect
import types
from typing import Any
from unittest import mock

import torch

RETARGETED_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.exchange_utils",
)
RETARGETED_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_installed = False


def install() -> bool:
    """Adapt Megatron once per process. Returns False, having changed nothing, where CUDA is available."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _import_uncompiled()
        _replace_cuda_functions()
        for name in RETARGETED_MODULES:
            _retarget(importlib.import_module(name))
        _installed = True
    return True


def _import_uncompiled() -> None:
    """Megatron hands its fusions, which are for GPUs, to torch.compile; as a decorator that would import the
    whole compiler, which takes seconds of every rank's start."""
    with mock.patch.object(torch, "compile", lambda function: function):
        importlib.import_module("megatron.core.jit")


class _NullStream:
    """Stands for torch.cuda.Stream and Event: work on the CPU is already ordered."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name in {"wait_stream", "wait_event", "record_event", "record", "wait", "synchronize"}:
            return lambda *_args, **_kwargs: None
        if name == "query":
            return lambda: True
        raise AttributeError(name)

    def __enter__(self) -> "_NullStream":
        return self

    def __exit__(self, *_exc: object) -> bool:
        return False


def _replace_cuda_functions() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_args, **_kwargs: _NullStream()
    torch.cuda.stream = lambda _stream=None: _NullStream()
    torch.cuda.Stream = torch.cuda.Event = _NullStream
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self


def _retarget(module: types.ModuleType) -> None:
    """Replace the literals in every function and method that the module itself defines."""
    owners = [module] + [v for v in vars(module).values() if _defined_in(v, module) and inspect.isclass(v)]
    for owner in owners:
        for value in list(vars(owner).values()):
            function = _plain_function(value)
            if function is not None and _defined_in(function, module):
                function.__code__ = _retarget_code(function.__code__)


def _defined_in(value: Any, module: types.ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _plain_function(value: Any) -> types.FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    if callable(value):
        value = inspect.unwrap(value)
    return value if isinstance(value, types.FunctionType) else None


def _retarget_code(code: types.CodeType) -> types.CodeType:
    def constant(value: Any) -> Any:
        if isinstance(value, str):
            return RETARGETED_LITERALS.get(value, value)
        if isinstance(value, tuple):
            return tuple(constant(item) for item in value)
        return _retarget_code(value) if isinstance(value, types.CodeType) else value

    return code.replace(co_consts=tuple(constant(value) for value in code.co_consts))
