"""MegatronModel: one model (policy or actor) with its optimizer, behind two verbs: `score` and `update`.

Both run Megatron's own pipeline schedules over the micro-batches of a Batch. Logits exist on the last
pipeline stage only, so the callables that read them run there and nowhere else.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_jackpot.config import Optimizer, Parallel, Precision
from megatron_jackpot.models.build import (
    build_chunks,
    end_at_hidden,
    output_weight,
    transformer_config,
)
from megatron_jackpot.models.families import Family
from megatron_jackpot.models.precision import check_precision, layers_for, this_device
from megatron_jackpot.models.weights import load_weights
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.linear import LinearLogits, Logits
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Batch

Reader = Callable[[Logits, int], dict[str, Tensor]]
"""(logits [T, V/TP], micro-batch index) -> tensors; runs on the last pipeline stage."""
Loss = Callable[[Logits, int], tuple[Tensor, dict[str, Tensor]]]
"""(logits [T, V/TP], micro-batch index) -> (this micro-batch's share of the global loss, detached sums)."""


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did; the same numbers on every rank of a copy of the model."""

    grad_norm: float
    lr: float
    sums: dict[str, Tensor]
    """Detached sums of the loss over this rank's micro-batches; empty off the last stage."""


class MegatronModel:
    """A model on the mesh. Build with `MegatronModel.load`."""

    def __init__(
        self, name: str, family: Family, config: TransformerConfig, chunks: list[Any], mesh: Mesh
    ) -> None:
        self.name = name
        self.family = family
        self.config = config
        self.mesh = mesh
        self.chunks = chunks
        self.fused_linear = False
        """Whether readers and losses are given the factors of the logits (parallel/linear.py)."""
        self.folder: Path | None = None
        """Where config.json and the tokenizer are."""
        self.offloaded = False
        self._fresh = False
        self.optimizer: MegatronOptimizer | None = None
        self.scheduler: OptimizerParamScheduler | None = None
        self.optimizer_settings: dict[str, Any] = {}
        """What the optimizer was made with: the fields of its configuration, and `total_steps`."""

    @classmethod
    def load(
        cls,
        name: str,
        family: Family,
        folder: Path | None,
        *,
        mesh: Mesh,
        parallel: Parallel,
        precision: Precision,
        padded_vocab: int,
        frozen: bool = False,
    ) -> "MegatronModel":
        """The model of a folder, HF's or in Megatron's format, for scoring; None keeps a random
        initialisation.

        `frozen` is one that never learns: its weights are all it holds.
        """
        device = this_device()
        check_precision(precision, device, family, parallel.tp)
        te = layers_for(device) == "transformer_engine"
        config = transformer_config(family, parallel, precision, te=te)
        chunks = build_chunks(family, config, mesh, padded_vocab=padded_vocab, te=te)
        if folder is not None:
            load_weights(chunks, family, folder, mesh, padded_vocab)
        model = cls(name, family, config, chunks, mesh)
        model.fused_linear = precision.fused_linear
        for chunk in chunks:
            if precision.fused_linear and chunk.post_process:
                end_at_hidden(chunk)
        model.folder = folder
        if frozen:
            for chunk in chunks:
                chunk.requires_grad_(False)
        else:
            model._wrap(parallel)
        return model

    def vocab(self, temperature: float = 1.0) -> VocabSpec:
        """What vocab-parallel functions need to know about the logits of this model."""
        return VocabSpec(self.family.vocab_size, self.mesh.tp_group, temperature)

    def _wrap(self, parallel: Parallel) -> None:
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=True,
        )
        self.ddp_config = ddp
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        self.config.finalize_model_grads_func = _finalize_without_rescaling
        if parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def add_optimizer(self, settings: Optimizer, total_steps: int) -> None:
        """AdamW with Megatron's (distributed) optimizer and its learning-rate schedule over `total_steps`."""
        self.optimizer_settings = {**settings.model_dump(), "total_steps": total_steps}
        bf16 = self.config.params_dtype == torch.bfloat16
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=self.ddp_config.use_distributed_optimizer,
                overlap_param_gather=self.ddp_config.overlap_param_gather,
            ),
            self.chunks,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0 if settings.warmup_steps else settings.lr,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
            lr_decay_style=settings.decay,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.scheduler.step(0)

    def score(self, batch: Batch, reader: Reader) -> dict[str, Tensor] | None:
        """Run the model without gradients; stack what `reader` returns over micro-batches.

        Returns name -> [M, ...] on the last pipeline stage, None elsewhere.
        """
        with torch.no_grad(), self.fresh_parameters():
            results = self._run(batch, reader, forward_only=True)
        if not self.mesh.is_last_stage:
            return None
        ordered = [tensors for _, tensors in sorted(results, key=lambda pair: pair[0])]
        return {key: torch.stack([tensors[key] for tensors in ordered]) for key in ordered[0]}

    def update(
        self, batch: Batch, loss: Loss | None, may_step: Callable[[float], bool] = math.isfinite
    ) -> UpdateReport:
        """One optimizer step on the sum of `loss` over all micro-batches and data-parallel ranks; `loss` may
        be None off the last pipeline stage.

        `may_step` sees the global gradient norm before clipping, the same on every rank; False leaves
        weights, optimizer and schedule as they are.
        """
        if self.optimizer is None or self.scheduler is None:
            raise RuntimeError(f"{self.name}.update called before add_optimizer.")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batch, loss, forward_only=False)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm() or 0.0)
        if may_step(grad_norm):
            self.optimizer.step()
            self.scheduler.step(1)
        sums: dict[str, Tensor] = {}
        for _, tensors in sorted(results, key=lambda pair: pair[0]):
            for key, value in tensors.items():
                sums[key] = sums.get(key, 0) + value.double()
        return UpdateReport(grad_norm=grad_norm, lr=float(lr), sums=sums)

    def offload(self) -> None:
        """Optimizer state and master weights to host memory, gradient buffers freed (Megatron's own two
        functions).

        Parameters stay where they are: scoring and export need them.
        """
        if self.optimizer is not None and not self.offloaded:
            self.optimizer.offload_to_cpu()
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
            self.offloaded = True

    def reload(self) -> None:
        """What `offload` took away, on the device again; gradients are zero."""
        if self.offloaded:
            self.optimizer.restore_from_cpu()
            for chunk in self.chunks:
                chunk.restore_grad_buffers()
            self.offloaded = False

    @contextlib.contextmanager
    def fresh_parameters(self) -> Iterator[None]:
        """Within, every parameter is the one the last optimizer step produced.

        overlap_param_gather leaves shards of other ranks stale until the next training forward gathers them.
        The gathering is over the data-parallel ranks: all must enter. Within another one there is none, so
        that copies of the model may score different numbers of batches in it.
        """
        overlapped = self.optimizer is not None and self.ddp_config.overlap_param_gather
        if not overlapped or self._fresh:
            yield
            return
        for chunk in self.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
        self._fresh = True
        try:
            yield
        finally:
            self._fresh = False
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()

    def _run(self, batch: Batch, consume: Callable, *, forward_only: bool) -> list[tuple[int, dict]]:
        num_microbatches = batch.num_microbatches
        iterators = [iter(range(num_microbatches)) for _ in self.chunks]
        one = len(self.chunks) == 1
        results = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, batch, consume, forward_only),
            data_iterator=iterators[0] if one else iterators,
            model=self.chunks[0] if one else self.chunks,
            num_microbatches=num_microbatches,
            seq_length=batch.tokens_MT.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results or []

    def _forward_step(
        self, batch: Batch, consume: Callable, forward_only: bool, iterator: Iterator[int], chunk: Any
    ) -> tuple[Tensor, Callable]:
        index = next(iterator)
        output = chunk(
            input_ids=batch.tokens_MT[index][None],
            position_ids=batch.position_MT[index][None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(batch.cu_seqlens[index], batch.longest[index]),
        )

        def logits(output: Tensor) -> Logits:
            if not self.fused_linear:
                return output[0]
            # What never learns is not wrapped.
            return LinearLogits(output[0], output_weight(getattr(chunk, "module", chunk)))

        def read(output: Tensor, non_loss_data: bool = True) -> tuple[int, dict]:
            return index, consume(logits(output), index)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, tuple[int, dict]]:
            value, sums = consume(logits(output), index)
            # The count is a dummy: the loss is already divided by the global denominator.
            return value, torch.ones([], dtype=torch.int, device=value.device), (index, sums)

        return output, read if forward_only else loss


def packed_seq_params(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
    """Megatron's description of packed sequences that start at `cu_seqlens` [S + 1], int32; the `longest` has
    so many tokens."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _finalize_without_rescaling(chunks: list, _num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by a token count."""
    finalize_model_grads(chunks, None, **kwargs)
