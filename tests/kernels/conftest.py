"""Triton's interpreter where there is no CUDA device; it must be chosen before a kernel is defined."""

import os
from typing import Any

import torch


def patch_once_per_kernel() -> None:
    """The interpreter puts its own functions into triton.language when a kernel begins, and the same ones
    again at every call of a device function, which is half of its time. Here the second time is left out."""
    from triton.runtime import interpreter

    patch, call, language = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    patched: set[int] = set()

    def begin(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        call(executor, *args, **kwargs)

    def patch_new(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is language or value is language.core}
        if seen <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(fn)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, begin


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once_per_kernel()
