"""Megatron models of tests, on the ranks of the test that asks."""

from pathlib import Path

from megatron_jackpot.config import Config, Parallel, Precision
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.config.model_shape import padded_vocab_size
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import Family, family_of
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.parallel.context import Mesh


def load_model(
    folder: Path | None,
    *,
    name: str = "policy",
    family: Family | None = None,
    mesh: Mesh | None = None,
    parallel: Parallel | None = None,
    precision: Precision | None = None,
    padded_vocab: int | None = None,
) -> MegatronModel:
    """The model of a folder without an optimizer, in fp32 unless told otherwise, on a mesh made for it unless
    one is given. Random weights of `family` where folder is None."""
    parallel = parallel or Parallel()
    family = family or family_of(read_hf_config(folder))
    mesh = mesh or init_mesh(parallel, 0)
    return MegatronModel.load(
        name,
        family,
        folder,
        mesh=mesh,
        parallel=parallel,
        precision=precision or Precision(dtype="float32"),
        padded_vocab=padded_vocab or padded_vocab_size([family.vocab_size], mesh.tp),
    )


def load_models(
    config: Config, mesh: Mesh, folders: dict[str, Path | None], families: dict[str, Family], steps: int = 10
) -> dict[str, MegatronModel]:
    """Models of one run by name, with their optimizers: they share the vocabulary's padded size."""
    padded = padded_vocab_size([family.vocab_size for family in families.values()], mesh.tp)
    models = {}
    for name, folder in folders.items():
        models[name] = load_model(
            folder, name=name, family=families[name], mesh=mesh, parallel=config.parallel,
            precision=config.precision, padded_vocab=padded,
        )  # fmt: skip
        models[name].add_optimizer(getattr(config, name).optimizer, steps)
    return models
