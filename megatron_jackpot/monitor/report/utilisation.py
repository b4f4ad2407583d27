"""Model FLOPs utilisation: what updates and scores cost by arithmetic, over what the GPUs could do."""

from pathlib import Path

from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.config.model_shape import ModelShape
from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.run.watchdog import DOING

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}
"""Part of a GPU's name -> dense bfloat16 TFLOP/s, from NVIDIA's data sheets; the first that fits."""


def flops_per_token(config: Row) -> float | None:
    """Of a trained token: 6 per parameter for a model that is updated and 2 for its score, attention left out
    (the usual 6 N of 2001.08361); None where a model's folder is gone."""
    total = 0.0
    for role in ("policy", "actor"):
        section = config.get(role)
        if not isinstance(section, dict):
            continue
        try:
            shape = ModelShape.of(read_hf_config(Path(str(section.get("hf")))))
        except (ValueError, OSError):
            return None
        updated = role == "policy" or config.get("algorithm", {}).get("train_actor", True)
        matrices = shape.num_layers * shape.layer_matrices + shape.hidden_size * shape.vocab_size
        total += (8 if updated else 2) * matrices
    return total or None


def peak_flops(folder: Path, provenance: Row) -> float | None:
    """FLOP/s of the trainer's GPUs together; None on other hardware."""
    gpu = str(provenance.get("machine", {}).get("gpu", ""))
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    ranks = len(list((folder / DOING).glob("rank-*")))
    return None if peak is None or not ranks else peak * 1e12 * ranks
