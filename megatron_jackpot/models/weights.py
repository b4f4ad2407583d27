"""Weights of a model folder into this rank's chunks, from HF's safetensors or from Megatron's own format.

A folder in Megatron's format holds config.json and the tokenizer too, so that either can stand for a model.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_jackpot.models.build import global_names
from megatron_jackpot.models.dist_folder import DistFolder, is_dist_folder
from megatron_jackpot.models.families import Family
from megatron_jackpot.models.hf_folder import HFFolder
from megatron_jackpot.parallel.context import Mesh


def load_weights(chunks: list[GPTModel], family: Family, folder: Path, mesh: Mesh, padded_vocab: int) -> None:
    """Fill the chunks from `folder`. Raises ValueError where the folder disagrees with its config.json."""
    if is_dist_folder(folder):
        _load_dist(chunks, family, folder)
    else:
        _load_hf(chunks, family, folder, mesh, padded_vocab)


def _load_hf(chunks: list[GPTModel], family: Family, folder: Path, mesh: Mesh, padded_vocab: int) -> None:
    source = HFFolder(folder)
    check_names(source, family)
    for chunk in chunks:
        for name, parameter in global_names(chunk).items():
            kind, layer = family.find(name)
            shard = family.shard(kind, layer, source.read, padded_vocab, mesh.tp, mesh.tp_rank)
            # An fp8 parameter in blocks is a leaf in its `data` too.
            with torch.no_grad():
                parameter.data.copy_(shard)


def check_names(source: HFFolder, family: Family) -> None:
    """Raises ValueError unless the folder's tensors are those of its config.json, in name and shape.

    A tied model may hold its output layer a second time, if it is the embedding.
    """
    wanted, folder = family.hf_shapes(), source.folder
    found = {name for name in source.names if not name.endswith("rotary_emb.inv_freq")}
    if family.tied and "lm_head.weight" in found:
        embedding = source.read("model.embed_tokens.weight")
        if not torch.equal(source.read("lm_head.weight"), embedding):
            raise ValueError(
                f"{folder}: config.json says tie_word_embeddings = true, but lm_head.weight is not the "
                "embedding."
            )
        found.remove("lm_head.weight")
    for name in sorted(wanted.keys() - found):
        source.spec(name)  # Raises, with the name.
    unexpected = sorted(found - wanted.keys())
    if unexpected:
        raise ValueError(
            f"{folder}: {len(unexpected)} tensors are not of the model in config.json: "
            f"{', '.join(unexpected[:5])}."
        )
    for name, shape in wanted.items():
        if source.spec(name).shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {source.spec(name).shape}, config.json asks for {shape}."
            )


def _load_dist(chunks: list[GPTModel], family: Family, folder: Path) -> None:
    DistFolder(folder).check(family)
    with torch.no_grad():
        # The padding of the vocabulary may be longer here than in the folder.
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
        wanted = {f"model{i}": _tensors(chunk.sharded_state_dict()) for i, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(wanted, str(folder))
        for index, chunk in enumerate(chunks):
            missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
            assert not _tensors(dict.fromkeys([*missing, *unexpected])), (missing, unexpected)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Without Transformer Engine's fp8 scales, which a folder made from HF's does not have."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}
