"""The process that runs a program: it gets the text, what the tests call it with or write to it, no more."""

import builtins
import json
import os
import sys

from megatron_jackpot.rewards.sandbox.values import FRAME, Value, decode, encode, to_frame

MODULES = (
    *("abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "collections.abc"),
    *("contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions"),
    *("functools", "gc", "graphlib", "hashlib", "heapq", "hmac", "html", "inspect", "io", "ipaddress"),
    *("itertools", "json", "keyword", "math", "numbers", "operator", "os", "pprint", "queue", "random", "re"),
    *("secrets", "statistics", "string", "struct", "sys", "textwrap", "threading", "time", "timeit", "types"),
    *("traceback", "typing", "unicodedata", "uuid", "warnings", "weakref", "zlib"),
)
"""Of the standard library, what a program may import: loaded before the process is sealed."""
LOADED_LATE = ("heapq", "copyreg", "encodings.ascii", "encodings.latin_1", "encodings.utf_16")
"""Modules that others of them load in the midst of a call."""


def preload(text: str) -> None:
    """Import the MODULES that `text` names, and at times some that it does not."""
    for name in LOADED_LATE:
        __import__(name)
    if "import" in text:
        for name in MODULES:
            if f" {name}" in text or f",{name}" in text:
                __import__(name)
    if "strptime" in text:
        __import__("_strptime")


def no_more_imports() -> None:
    """What is not loaded and not built into the interpreter is not found, rather than forbidden."""
    sys.path.clear()
    sys.meta_path[:] = [one for one in sys.meta_path if getattr(one, "__name__", "") != "PathFinder"]


def run_with_input(program: str) -> None:
    """As a script, from standard input to standard output; its exit is this process's."""
    os.read(0, 1)  # Its turn has come.
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "__builtins__": builtins})


def serve_calls(program: str, answers: int) -> None:
    """As a module, whose functions are called by requests on standard input and answered on `answers`."""
    os.read(0, 1)
    scope: dict[str, Value] = {"__name__": "program", "__builtins__": builtins}
    exec(compile(program, "<program>", "exec"), scope)
    objects: list[Value] = []

    def number_of(thing: Value) -> int:
        objects.append(thing)
        return len(objects) - 1

    names = {name: one for name, one in scope.items() if isinstance(name, str) and name[:2] != "__"}
    modules = [name for name, one in names.items() if isinstance(one, type(sys))]
    told = {name: encode(one, number_of) for name, one in names.items() if name not in modules}
    os.write(answers, to_frame(told))
    while header := _exactly(FRAME):
        request = json.loads(_exactly(int.from_bytes(header, "big")))
        try:
            thing = objects[request["of"]]
            if "name" in request:
                value = getattr(thing, request["name"])
            else:
                args = decode(request["args"], objects.__getitem__)
                value = thing(*args, **decode(request["kwargs"], objects.__getitem__))
            reply = to_frame({"value": encode(value, number_of)})
        except Exception as error:
            reply = to_frame({"raised": _kind(error), "text": str(error)[:1000]})
        while reply:
            reply = reply[os.write(answers, reply) :]


def _kind(error: Exception) -> str:
    """The nearest of Python's own exceptions."""
    return next(one.__name__ for one in type(error).__mro__ if getattr(builtins, one.__name__, None) is one)


def _exactly(size: int) -> bytes:
    """So many bytes of standard input; none at its end."""
    found = b""
    while len(found) < size and (piece := os.read(0, size - len(found))):
        found += piece
    return found if len(found) == size else b""
