"""Corrections by name: from samples of the server to (keep, weight, count) for the policy's loss.

policy loss = -sum keep * weight * surrogate / N, N the global sum of count. A method is a frozen dataclass:
its fields are the keys under `algorithm.correction` in YAML.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_jackpot.algorithm.importance import (
    CurrentIS,
    GeometricFilter,
    IcePop,
    KFilter,
    MaskedIS,
    NoCorrection,
    SequenceMIS,
    SequenceTIS,
    TokenIS,
)
from megatron_jackpot.algorithm.jackpot import PRESETS, Jackpot, Normaliser, ZTruncatedIS
from megatron_jackpot.algorithm.registry import build, check_choice
from megatron_jackpot.algorithm.scores import Correction, Scores, SumOverBatch

CORRECTIONS: dict[str, type] = {
    "none": NoCorrection,
    "tis": TokenIS,
    "mis": MaskedIS,
    "icepop": IcePop,
    "seq_tis": SequenceTIS,
    "seq_mis": SequenceMIS,
    "geo_rs": GeometricFilter,
    "k_filter": KFilter,
    "tis_current": CurrentIS,
    "z_tis": ZTruncatedIS,
    "jackpot": Jackpot,
}


def make_correction(
    name: str, knobs: Mapping[str, Any], seed: int
) -> Callable[[Scores, SumOverBatch], Correction]:
    """The method of `algorithm.correction`; `seed` is the default key of the accept draws.

    `preset` (jackpot only) names a set of knobs in PRESETS. Raises ValueError naming the key.
    """
    knobs = dict(knobs)
    if name == "jackpot":
        preset = knobs.pop("preset", "paper")
        check_choice("algorithm.correction.preset", preset, tuple(PRESETS))
        knobs = {**PRESETS[preset], **knobs}
    if name in CORRECTIONS and issubclass(CORRECTIONS[name], Normaliser):
        knobs.setdefault("seed", seed)
    return build(name, knobs, CORRECTIONS, "algorithm.correction")
