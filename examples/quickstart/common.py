"""What prepare.py and control.py share: held-out problems of the run, model set-up, greedy accuracy."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_jackpot.config import Config, Optimizer, Parallel, Precision, load_config
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.data.prompts import PromptSet, heldout_prompts, training_prompts
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.vocab import vocab_parallel_argmax
from megatron_jackpot.train.greedy import greedy

HERE = Path(__file__).parent
DEVELOPMENT_SEED = 9_000_000


def read_warmup() -> dict[str, Any]:
    return yaml.safe_load((HERE / "warmup.yaml").read_text())


def read_run(overrides: list[str]) -> Config:
    return load_config(HERE / "run.yaml", overrides)


def heldout(config: Config, tokenizer) -> tuple[PromptSet, PromptSet]:
    """(test, development): the problems the run evaluates on, drawn by the same code, and others for the
    warm-up."""
    training = training_prompts(config.data, tokenizer).texts
    test = heldout_prompts(config.data, config.evaluation, tokenizer, exclude=training)
    knobs = config.evaluation.model_copy(update={"seed": DEVELOPMENT_SEED, "size": 200})
    return test, heldout_prompts(config.data, knobs, tokenizer, exclude=training | test.texts)


def make_mesh_and_packer(warmup: dict[str, Any]) -> tuple[Mesh, Packer]:
    mesh = init_mesh(Parallel(threads=warmup["threads"]), warmup["seed"])
    return mesh, Packer(mesh, tokens=warmup["packing_tokens"], enabled=True, num_minibatches=1, vpp=None)


def make_model(
    name: str, hf_config: dict, folder: Path | None, mesh: Mesh, optimizer: Optimizer, steps: int
) -> MegatronModel:
    family = family_of(hf_config)
    model = MegatronModel.load(
        name,
        family,
        folder,
        mesh=mesh,
        parallel=Parallel(),
        precision=Precision(dtype="float32", fused_linear=False),
        padded_vocab=family.vocab_size,
    )
    model.add_optimizer(optimizer, steps)
    return model


def accuracy(model: MegatronModel, prompts: PromptSet, tokenizer, config: Config, packer: Packer) -> float:
    """Share of held-out problems whose greedy answer is the right text."""
    answers = greedy(
        model,
        [prompt.tokens for prompt in prompts.prompts],
        partial(vocab_parallel_argmax, vocab=model.vocab()),
        max_new_tokens=config.evaluation.max_new_tokens,
        stop_ids=(tokenizer.eos_token_id,),
        packing_tokens=packer.tokens,
    )
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    right = [text == prompt.label["answer"] for text, prompt in zip(texts, prompts.prompts, strict=True)]
    return sum(right) / len(right)
