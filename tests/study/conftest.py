"""A study in miniature: tiny models with random weights, real problems, one process of one thread."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.study_parts import task
from benchmarks.study_parts.families import FAMILIES
from megatron_jackpot.config import Parallel
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from tests.tiny import ACTOR, POLICY, write_model, write_tokenizer


@pytest.fixture(scope="session")
def mesh():
    yield init_mesh(Parallel(threads=1), 0)
    destroy_mesh()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/policy and FOLDER/near, with a tokenizer each."""
    folder = tmp_path_factory.mktemp("study-models")
    for seed, (name, shape) in enumerate({"policy": POLICY, "near": ACTOR}.items()):
        write_model(folder / name, seed, **shape)
        write_tokenizer(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path: Path, models: Path) -> Path:
    """A study's folder after the preparation of every family."""
    for name, family in FAMILIES.items():
        home = task.home(tmp_path, name)
        (home / "models").mkdir(parents=True)
        (home / "models" / "warmup-0").symlink_to(models)
        (home / "data").mkdir()
        for file, size in ((task.TRAINING, 40), (task.HELDOUT, 24)):
            drawn = itertools.islice(family.problems(file), size)
            rows = [json.dumps({"prompt": task.question(i), "answer": family.answer(i)}) for i in drawn]
            (home / "data" / file).write_text("\n".join(rows) + "\n")
    return tmp_path
