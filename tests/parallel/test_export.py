"""Weights of a push read by the main rank while the others take part, and optimizer state that goes and comes
back."""

from pathlib import Path

import pytest
import torch

from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.sync.prefetcher import BucketPrefetcher
from megatron_jackpot.sync.stream import WeightStream, export
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.sync.test_fp8_weights import dequantise
from tests.tiny import groups


def _three_readings(rank: int, world: int, folder: str) -> dict | None:
    """One whole, one given up after a bucket, one whole; then the same through bf16 and fp8."""
    layout = Layout(tp=world // 2, pp=2, overlap=world > 2)
    model = load_trainer(make_config(layout, Path(folder))).actor
    whole = export(model)
    found = {}
    for name, knobs in (("plain", {}), ("bf16", dict(dtype=torch.bfloat16)), ("fp8", dict(fp8=True))):
        weights = WeightStream(model, name, **{"dtype": None, "fp8": False, **knobs}, timeout_s=30)
        if rank != 0:
            weights.take_part()
            continue
        found[name] = dict(weights)
        with pytest.raises(ZeroDivisionError):
            with BucketPrefetcher(weights, 1000, torch.device("cpu"), 30) as made:
                for _ in made:
                    raise ZeroDivisionError
        found[f"{name} again"] = dict(weights)
        weights.finish()
    return {"whole": whole, **found} if rank == 0 else None


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_reading_gives_the_whole_weights_also_after_one_that_was_given_up(
    folder: Path, world: int
) -> None:
    found = run_ranks(_three_readings, world, 120, str(folder))[0]
    whole = found["whole"]
    for name in ("plain", "plain again"):
        assert list(found[name]) == list(whole)
        assert all(torch.equal(found[name][n], tensor) for n, tensor in whole.items())
    for n, tensor in whole.items():
        assert torch.equal(found["bf16 again"][n], tensor.bfloat16())
        sent = found["fp8 again"][n]
        if n.endswith("_proj.weight"):
            sent = dequantise(sent, found["fp8 again"][f"{n}_scale_inv"])
        torch.testing.assert_close(sent, tensor, rtol=1 / 16, atol=float(tensor.abs().max()) / 448)


def _main_rank_goes_away(rank: int, world: int, folder: str) -> str:
    model = load_trainer(make_config(Layout(tp=2), Path(folder))).actor
    weights = WeightStream(model, "lost", dtype=None, fp8=False, timeout_s=1)
    if rank == 0:
        return ""
    with pytest.raises(TimeoutError) as caught:
        weights.take_part()
    return str(caught.value)


def test_a_rank_does_not_wait_for_ever_for_the_main_rank(folder: Path) -> None:
    assert (
        "Rank 1 waited 1 s for the main rank to come to 'lost/0'"
        in run_ranks(_main_rank_goes_away, 2, 60, str(folder))[1]
    )


def _two_steps(rank: int, world: int, folder: str, offload: bool) -> tuple[dict, list[int]]:
    """Weights after two steps in bf16 with fp32 masters, and the sizes of the gradient buffers in between."""
    config = make_config(Layout(dp=2), Path(folder))
    precision = config.precision.model_copy(update={"dtype": "bfloat16"})
    trainer = load_trainer(config.model_copy(update={"precision": precision}))
    models: tuple[MegatronModel, ...] = (trainer.policy, trainer.actor)
    mesh, sizes = trainer.mesh, []
    for _ in range(2):
        for model in models:
            model.reload()
        mine = groups(range(mesh.dp_rank, NUM_PROMPTS, mesh.dp))
        trainer.learn(trainer.packer.pack(mine, TOP_K), trainer.measurements())
        if offload:
            for model in models:
                model.offload()
                model.offload()  # twice is once
            sizes += [
                b.grad_data.untyped_storage().size() for m in models for c in m.chunks for b in c.buffers
            ]
            trainer.scorer.logp(trainer.policy, trainer.packer.pack(mine, TOP_K))  # needs neither
    return {m.name: export(m) for m in models}, sizes


def test_training_with_optimizer_state_that_was_away_is_training_without(folder: Path) -> None:
    (kept, _), _ = run_ranks(_two_steps, 2, 120, str(folder), False)
    (moved, sizes), _ = run_ranks(_two_steps, 2, 120, str(folder), True)
    assert sizes and not any(sizes)
    for name, tensors in kept.items():
        assert all(torch.equal(moved[name][n], tensor) for n, tensor in tensors.items())
