"""Logits of a scoring pass, kept as last hidden states and recomputed in chunks of tokens.

Shapes: T tokens of a micro-batch, H hidden, V/TP this rank's slice of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_jackpot.models.engine import MegatronModel, Reader
from megatron_jackpot.parallel.linear import LinearLogits
from megatron_jackpot.parallel.vocab_spec import VocabSpec


class FrozenHead:
    """Hidden states in front of the output layer and a copy of its weight; T x H numbers instead of T x V.

    Empty off the last pipeline stage.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.hidden_TH: list[Tensor] = []
        """One entry per micro-batch, in order."""
        self.weight_VH: Tensor | None = None

    def logits(self, m: int) -> Callable[[slice], Tensor]:
        """(tokens of micro-batch m) -> their logits [t, V/TP], as the model computed them."""

        def compute(rows: slice) -> Tensor:
            assert self.weight_VH is not None
            return F.linear(self.hidden_TH[m][rows], self.weight_VH)

        return compute

    def score(self, reader: Reader) -> dict[str, Tensor] | None:
        """What `MegatronModel.score` gives, of the pass that was recorded and without another one."""
        if self.weight_VH is None:
            return None
        with torch.no_grad():
            logits = (LinearLogits(hidden_TH, self.weight_VH) for hidden_TH in self.hidden_TH)
            read = [reader(one, m) for m, one in enumerate(logits)]
        return {key: torch.stack([tensors[key] for tensors in read]) for key in read[0]}

    def common(self, vocab: VocabSpec) -> VocabSpec:
        """`vocab` of another model, over the ids that both know.

        config.json files may round one tokenizer's vocabulary up differently.
        """
        return replace(vocab, size=min(vocab.size, self.vocab_size))

    def rows(self, start: int, stop: int) -> "FrozenHead":
        """Micro-batches start .. stop - 1: one mini-batch."""
        part = FrozenHead(self.vocab_size)
        part.hidden_TH, part.weight_VH = self.hidden_TH[start:stop], self.weight_VH
        return part


@contextmanager
def record_head(model: MegatronModel) -> Iterator[FrozenHead]:
    """Within, forward passes of `model` leave their last hidden states in the result."""
    head = FrozenHead(model.family.vocab_size)
    handles = []
    for chunk in model.chunks:
        module = chunk.module
        if module.post_process:

            def record(
                layer: ColumnParallelLinear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor | None]
            ) -> None:
                hidden_TH = args[0].detach().squeeze(1)
                if model.config.sequence_parallel:
                    hidden_TH = _gather_rows(hidden_TH, model)
                head.hidden_TH.append(hidden_TH.clone())
                if head.weight_VH is None:
                    weight = kwargs.get("weight")
                    weight = layer.weight if weight is None else weight
                    assert weight is not None, "an output layer without a weight is given one"
                    # A copy: the optimizer may move the weight while this head is still in use.
                    head.weight_VH = weight.detach().clone()

            handles.append(module.output_layer.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield head
    finally:
        for handle in handles:
            handle.remove()


def _gather_rows(shard: Tensor, model: MegatronModel) -> Tensor:
    whole = shard.new_empty((shard.shape[0] * model.mesh.tp, shard.shape[1]))
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=model.mesh.tp_group)
    return whole
