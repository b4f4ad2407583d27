"""Corrections by name: from samples of the server to (keep, weight, count) for the policy's loss.

policy loss = -sum keep * weight * surrogate / N, N the global sum of count. A method is a frozen dataclass:
its fields are the keys under `algorithm.correction` in YAML. A class of the user's own is named by its path.
"""

from collections.abc import Mapping
from typing import Any

from megatron_jackpot.algorithm.correction_base import CorrectionMethod
from megatron_jackpot.algorithm.importance import (
    CurrentIS,
    GeometricFilter,
    GeometricTIS,
    IcePop,
    KFilter,
    MaskedIS,
    NoCorrection,
    SequenceMIS,
    SequenceTIS,
    TokenIS,
)
from megatron_jackpot.algorithm.jackpot import Jackpot, ZTruncatedIS
from megatron_jackpot.algorithm.registry import Registry, check_choice, find, make

CORRECTIONS = Registry(
    CorrectionMethod,
    {
        "none": NoCorrection,
        "tis": TokenIS,
        "mis": MaskedIS,
        "icepop": IcePop,
        "seq_tis": SequenceTIS,
        "seq_mis": SequenceMIS,
        "geo_tis": GeometricTIS,
        "geo_rs": GeometricFilter,
        "k_filter": KFilter,
        "tis_current": CurrentIS,
        "z_tis": ZTruncatedIS,
        "jackpot": Jackpot,
    },
)


def make_correction(name: str, settings: Mapping[str, Any], seed: int) -> CorrectionMethod:
    """The method of `algorithm.correction`; `seed` is the default key of the accept draws.

    `preset`, of a method that has some, names settings; those written beside it win. Raises ValueError naming
    the key, a line for each mistake.
    """
    where, settings = "algorithm.correction", dict(settings)
    method = find(name, CORRECTIONS, where)
    mistakes = []
    if method.presets:
        preset = settings.pop("preset", "paper")
        try:
            check_choice(f"{where}.preset", preset, tuple(method.presets))
        except ValueError as error:
            mistakes.append(str(error))
        settings = {**method.presets.get(preset, {}), **settings}
    if method.seeded:
        settings.setdefault("seed", seed)
    try:
        made = make(method, name, settings, where)
    except ValueError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return made
