"""Deterministic mode: what the libraries are told, what is refused, and the same bits from two runs."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_jackpot.config import Parallel, Precision
from megatron_jackpot.models.build import transformer_config
from megatron_jackpot.models.deterministic import ENVIRONMENT, be_deterministic
from megatron_jackpot.models.families import family_of
from tests.parallel.layouts import Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import groups, hf_config, write_models


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)


def test_every_library_is_told_before_it_starts():
    environment = {"PATH": "/bin"}
    be_deterministic(environment)
    assert environment == {"PATH": "/bin", **ENVIRONMENT}
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def test_an_accepted_choice_of_the_environment_stays():
    environment = {"NCCL_ALGO": "Ring,CollnetChain", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    be_deterministic(environment)
    assert environment == {
        **ENVIRONMENT,
        "NCCL_ALGO": "Ring,CollnetChain",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_ALGO", "Tree"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_an_environment_that_asks_for_the_opposite_is_refused(name, value):
    environment = {name: value}
    with pytest.raises(ValueError, match=f"{name}={value}: must be one of .*Unset {name}"):
        be_deterministic(environment)
    assert environment == {name: value} and not torch.are_deterministic_algorithms_enabled()


def test_a_process_in_which_cuda_has_started_is_refused():
    with mock.patch("torch.cuda.is_initialized", lambda: True):
        with pytest.raises(ValueError, match="came after CUDA had started"):
            be_deterministic({})


def test_megatron_is_told():
    family = family_of(hf_config())
    for asked in (False, True):
        precision = Precision(dtype="float32", deterministic=asked)
        config = transformer_config(family, Parallel(), precision, te=False)
        assert config.deterministic_mode is asked


def _weights_after_a_step(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    be_deterministic()
    config = make_config(Layout(tp=2, correction=(("name", "jackpot"), ("z", "exact"))), Path(folder))
    precision = config.precision.model_copy(update={"deterministic": True})
    trainer = load_trainer(config.model_copy(update={"precision": precision}))
    assert trainer.policy.config.deterministic_mode
    batch = trainer.packer.pack(groups(range(8)) if trainer.mesh.is_leader else None, 8)
    trainer.learn(batch, trainer.measurements())
    models = trainer.state.models.values()
    return {f"{m.name}.{n}": p.detach() for m in models for n, p in m.chunks[0].module.named_parameters()}


def test_two_runs_give_the_same_bits(tmp_path):
    write_models(tmp_path)
    once, again = (run_ranks(_weights_after_a_step, 2, 120, str(tmp_path)) for _ in range(2))
    for rank, weights in enumerate(once):
        for name, weight in weights.items():
            assert torch.equal(weight, again[rank][name]), name
