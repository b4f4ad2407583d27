"""What --help says of the settings: all of them, a section, one key, or the methods that may stand in one."""

import shutil
import textwrap

from megatron_jackpot.config import Config, describe
from megatron_jackpot.config.schema import METHOD_KEYS
from megatron_jackpot.config.suggest import meant

LINE = 110


def settings(key: str = "") -> str:
    """Every setting with its default and meaning, or those at and below `key`, methods with their choices.

    Raises ValueError for a key that is none.
    """
    rows = [row for row in describe() if not key or f"{row[0]}.".startswith(f"{key}.")]
    if not rows and (method := next((known for known in METHOD_KEYS if key.startswith(f"{known}.")), None)):
        raise ValueError(f"'{key}' is a setting of one of its methods: --help {method}")
    if not rows:
        keys = [known for known, _, _ in describe()]
        above = key.rpartition(".")[0]
        beside = [known.removeprefix(f"{above}.") for known in keys if known.startswith(f"{above}.")]
        names = list(dict.fromkeys(known.split(".")[0] for known in beside)) or list(Config.model_fields)
        found = " or ".join(f"'{known}'" for known in meant(key, names, keys))
        remedy = f"Did you mean {found}?" if found else f"Sections: {', '.join(Config.model_fields)}."
        raise ValueError(f"There is no setting '{key}'. {remedy}")
    lines = ["settings (key, default, meaning):"]
    for name, default, meaning in rows:
        lines += [f"  {name} = {default}", *_wrapped(meaning, 6)]
        if key and name in METHOD_KEYS:
            lines += _methods(name)
    return "\n".join(lines)


def _methods(key: str) -> list[str]:
    # Formulas are torch; whoever asks for no method need not wait for it.
    from megatron_jackpot.train.method_help import choices

    lines = [
        f"  choices (method; setting = default: meaning), as {key}=NAME or {{name: NAME, setting: value}}:"
    ]
    for choice in choices(key):
        lines += [f"    {choice.name}", *_wrapped(choice.meaning, 8)]
        for name, default, meaning in choice.settings:
            lines += _wrapped(f"{name} = {default}: {meaning}", 10, hanging=4)
    return [*lines, "    package.module:Class", *_wrapped("One of your own: examples/own_methods.", 8)]


def _wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        min(shutil.get_terminal_size().columns, LINE),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_on_hyphens=False,
    )
