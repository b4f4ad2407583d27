"""Copies of a model that score different numbers of batches, as an evaluation of answers of any length."""

from pathlib import Path

import torch

from megatron_jackpot.models.mesh import destroy_mesh
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import groups


def _scored(rank: int, world: int, folder: str) -> list[torch.Tensor]:
    """This copy's part of a batch by weights that an optimizer step has moved, as often as it asks, and again
    after that, each score by itself."""
    trainer = load_trainer(make_config(Layout(dp=2, overlap=True), Path(folder)))
    batch = trainer.packer.pack(groups(range(rank, NUM_PROMPTS, 2)), TOP_K)
    trainer.learn(batch, trainer.measurements())
    same = trainer.packer.pack(groups(range(2)), TOP_K)
    model = trainer.policy

    def score() -> torch.Tensor:
        return model.score(same, lambda logits, m: {"all": logits[:]})["all"]

    with model.fresh_parameters():
        found = [score() for _ in range(1 + 2 * rank)]
    found.append(score())
    destroy_mesh()
    return found


def test_copies_score_as_often_as_each_needs_and_by_the_weights_of_the_last_step(folder: Path) -> None:
    for rank, found in enumerate(run_ranks(_scored, 2, 90, str(folder))):
        assert len(found) == 2 + 2 * rank
        for one in found:
            assert torch.equal(one, found[-1])
