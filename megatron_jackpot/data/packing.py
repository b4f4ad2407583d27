"""Rollouts -> packed micro-batches of one length, balanced by length over data-parallel ranks.

`packing.tokens` says how many micro-batches a step has; they are then filled evenly, and are as long as the
fullest needs. Every rank gets the same number of them; what a rank lacks is padding that trains nothing but
still runs, because every rank must enter the same collectives.
"""

import heapq
import math
import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_jackpot.data.bins import fill, padded
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Batch, Rollout

SHORTEST_PADDING = 64
"""Length of an empty micro-batch's sequences, so that it does not hold thousands of them."""
FINEST = 64
"""Lengths of micro-batches are multiples of this part of `packing.tokens`: few, since a GPU's attention plans
anew for each."""
EVEN_TRIES = 8
"""Rooms that are tried on the way from the mean to `packing.tokens`."""
NOBODY = np.array([[-1, -1, 0, 0]], np.int64)
"""A pruned rollout that is none."""


class Packer:
    """Packs a step's rollouts for every rank of the mesh."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        tokens: int,
        enabled: bool,
        num_minibatches: int,
        vpp: int | None,
        window: int | None = None,
    ) -> None:
        """`window` is that of `data.bins.fill`."""
        self.mesh, self.window = mesh, window
        self.tokens = padded(tokens, mesh.tp)
        self.enabled = enabled
        self.num_minibatches = num_minibatches
        self.microbatch_multiple = mesh.pp if vpp is not None else 1

    def pack(
        self,
        groups: Sequence[Sequence[Rollout]] | None,
        top_k: int,
        pruned: Sequence[Sequence[Rollout]] | None = None,
    ) -> Batch:
        """`groups` are the DP leader's prompts in order, each a list of rollouts; None on other ranks.
        `pruned` are those of the same prompts that only count in N.

        The batch lies on the mesh's device. Collectives: exchange between leaders over dp, a sum and two
        maxima over dp, broadcast over tp x pp.
        """
        columns = None
        if self.mesh.is_leader:
            if groups is None:
                raise RuntimeError("The DP leader must bring its rollouts to Packer.pack.")
            total = self._over_leaders(len(groups), dist.ReduceOp.SUM)
            place = (self.num_minibatches, self.mesh.dp_rank, self.mesh.dp, total)
            left_out = split_groups(pruned or [[] for _ in groups], *place)
            minis = self._balance(split_groups(groups, *place))
            columns = self._pack_minis(minis, left_out, top_k)
        return make_batch(self.mesh.tensors_from_leader(columns), num_minibatches=self.num_minibatches)

    def _balance(self, minis: list[list[Rollout]]) -> list[list[Rollout]]:
        if self.mesh.dp == 1:
            return minis
        return [exchange(mini, self.mesh.dp_group) for mini in minis]

    def _pack_minis(
        self, minis: list[list[Rollout]], pruned: list[list[Rollout]], top_k: int
    ) -> dict[str, Tensor]:
        capacity = self.tokens if self.enabled else 0
        lengths = [[r.num_tokens for r in mini] for mini in minis]
        bins = [fill(each, capacity, self.window) for each in lengths]
        num_rows = self._largest(max(1, *map(len, bins)) if len(bins) > 1 else max(1, len(bins[0])))
        num_rows = math.ceil(num_rows / self.microbatch_multiple) * self.microbatch_multiple
        if self.enabled:
            bins = [self._even_bins(each, num_rows) for each in lengths]
        width = self._width(lengths, bins)
        rows = []
        for mini, mini_bins, left_out in zip(minis, bins, pruned, strict=True):
            segment, first = 0, len(rows)
            for content in mini_bins + [[]] * (num_rows - len(mini_bins)):
                rows.append(pack_row([mini[i] for i in content], width, top_k, first_segment=segment))
                segment += len(content)
            rows[first] |= pruned_columns(left_out)
        return stack_rows(rows)

    def _largest(self, number: int) -> int:
        return self._over_leaders(number, dist.ReduceOp.MAX)

    def _over_leaders(self, number: int, how: dist.ReduceOp.RedOpType) -> int:
        if self.mesh.dp == 1:
            return number
        reduced = torch.tensor(number, device=self.mesh.device)
        dist.all_reduce(reduced, op=how, group=self.mesh.dp_group)
        return int(reduced)

    def _width(self, lengths: list[list[int]], bins: list[list[list[int]]]) -> int:
        """Tokens of every micro-batch of the step: `tokens`, or what the fullest one on any rank needs."""
        pairs = zip(lengths, bins, strict=True)
        filled = [sum(each[i] for i in content) for each, own in pairs for content in own]
        # Of 16 on each tensor-parallel rank, also where it has a part of the sequence alone: fp8's products
        # want a multiple of 8.
        unit = padded(math.ceil(self.tokens / FINEST / self.mesh.tp), 1) * self.mesh.tp
        return min(self.tokens, max(1, math.ceil(self._largest(max(filled, default=0)) / unit)) * unit)

    def _even_bins(self, lengths: list[int], rows: int) -> list[list[int]]:
        """At most `rows` bins of about the same room, those of `tokens` where less does not do."""
        least = max([math.ceil(sum(lengths) / rows), *lengths])
        for part in range(EVEN_TRIES):
            bins = fill(lengths, least + (self.tokens - least) * part // EVEN_TRIES, self.window)
            if len(bins) <= rows:
                return bins
        return fill(lengths, self.tokens, self.window)


def stack_rows(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Micro-batches as one tensor a field, [M, ...]; the ends of `cu_seqlens` are filled up with -1, those of
    `pruned_MP4` with rollouts of no token."""
    longest, most = (max(len(row[name]) for row in rows) for name in ("cu_seqlens", "pruned_MP4"))

    def filled(row: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        starts, pruned = row["cu_seqlens"], row["pruned_MP4"]
        nobody = np.tile(NOBODY, (most - len(pruned), 1))
        return {
            **row,
            "cu_seqlens": np.pad(starts, (0, longest - len(starts)), constant_values=-1),
            "pruned_MP4": np.concatenate([pruned, nobody]),
        }

    even = [filled(row) for row in rows]
    return {name: torch.from_numpy(np.stack([row[name] for row in even])) for name in rows[0]}


def make_batch(columns: Mapping[str, Tensor], *, num_minibatches: int = 1) -> Batch:
    """The Batch of `stack_rows`' tensors, by the names of its fields."""
    starts = columns["cu_seqlens"]
    # Read on the host once: each number asked of a device later would make it wait.
    edges = [[edge for edge in row if edge >= 0] for row in starts.tolist()]
    return Batch(
        **{
            **columns,
            "cu_seqlens": tuple(row[: len(own)].contiguous() for row, own in zip(starts, edges, strict=True)),
        },
        longest=tuple(max(stop - start for start, stop in pairwise(own)) for own in edges),
        num_minibatches=num_minibatches,
    )


def split_groups(
    groups: Sequence[Sequence[Rollout]], num_minibatches: int, dp_rank: int, dp: int, total: int
) -> list[list[Rollout]]:
    """Consecutive whole groups of the step per mini-batch, the same cut on every layout.

    A leader holds every dp-th of the step's `total` groups, as the loader deals them out; of a mini-batch
    with fewer groups than leaders some hold none.
    """
    minis: list[list[Rollout]] = [[] for _ in range(num_minibatches)]
    for index, group in enumerate(groups):
        place = index * dp + dp_rank
        # Where an allocator gave leaders different numbers of groups, places go beyond the total.
        minis[min(place * num_minibatches // total, num_minibatches - 1)] += group
    return minis


def assign_balanced(lengths: Sequence[int], ranks: int) -> list[int]:
    """Rank of each sequence: longest first, always to the rank with the fewest tokens so far."""
    heap = [(0, rank) for rank in range(ranks)]
    owner = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(heap)
        owner[index] = rank
        heapq.heappush(heap, (tokens + lengths[index], rank))
    return owner


def exchange(rollouts: list[Rollout], group: ProcessGroup) -> list[Rollout]:
    """Move rollouts between DP leaders so that every rank holds about the same number of tokens.

    Collectives over dp: all-gather of lengths, all-to-all of the moved rollouts' bytes.
    """
    lengths: list[list[int]] = [[] for _ in range(group.size())]
    dist.all_gather_object(lengths, [r.num_tokens for r in rollouts], group=group)
    owner = assign_balanced([n for part in lengths for n in part], group.size())
    start = sum(len(part) for part in lengths[: group.rank()])
    mine = owner[start : start + len(rollouts)]
    parcels: list[list[tuple[int, Rollout]]] = [[] for _ in range(group.size())]
    for offset, (rank, rollout) in enumerate(zip(mine, rollouts, strict=True)):
        parcels[rank].append((start + offset, rollout))
    received = _all_to_all([pickle.dumps(parcel) for parcel in parcels], group)
    # Only our own ranks' bytes are unpickled here; nothing from a server or a file comes this way.
    indexed = [item for parcel in received for item in pickle.loads(parcel)]
    return [rollout for _, rollout in sorted(indexed, key=lambda item: item[0])]


def _all_to_all(parcels: list[bytes], group: ProcessGroup) -> list[bytes]:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    sizes = torch.tensor([len(p) for p in parcels], dtype=torch.int64, device=device)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes, group=group)
    outgoing = torch.frombuffer(bytearray(b"".join(parcels)), dtype=torch.uint8).to(device)
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, outgoing, incoming.tolist(), sizes.tolist(), group=group)
    return [part.cpu().numpy().tobytes() for part in received.split(incoming.tolist())]


def pack_row(
    rollouts: Sequence[Rollout], tokens: int, top_k: int, *, first_segment: int
) -> dict[str, np.ndarray]:
    """One micro-batch as arrays by the names of Batch's fields.

    Raises ValueError when the sequences do not fit, naming lengths and the budget.
    """
    total = sum(r.num_tokens for r in rollouts)
    if total > tokens:
        raise ValueError(
            f"{len(rollouts)} sequences of {total} tokens do not fit packing.tokens = {tokens}. Raise "
            "packing.tokens."
        )
    row = _empty_row(tokens, top_k)
    starts = [0]
    for index, rollout in enumerate(rollouts):
        _write(row, rollout, starts[-1], first_segment + index)
        starts.append(starts[-1] + rollout.num_tokens)
    # Padding is cut like the real sequences: one long tail would dominate attention's cost.
    piece = max((r.num_tokens for r in rollouts), default=SHORTEST_PADDING)
    while starts[-1] < tokens:
        stop = min(starts[-1] + piece, tokens)
        row["position_MT"][starts[-1] : stop] = np.arange(stop - starts[-1])
        starts.append(stop)
    return {**row, "cu_seqlens": np.array(starts, dtype=np.int32)}


def pruned_columns(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """The field of Batch that says what rollouts count that do not train."""
    lengths = [int(r.valid.sum()) for r in rollouts]
    counts = [
        (r.epoch, r.prompt.id, length, length * r.correct)
        for r, length in zip(rollouts, lengths, strict=True)
    ]
    return {"pruned_MP4": np.array(counts, np.int64).reshape(-1, 4)}


def _empty_row(tokens: int, top_k: int) -> dict[str, np.ndarray]:
    return dict(
        tokens_MT=np.zeros(tokens, np.int64),
        labels_MT=np.zeros(tokens, np.int64),
        mask_MT=np.zeros(tokens, np.bool_),
        position_MT=np.zeros(tokens, np.int64),
        segment_MT=np.full(tokens, -1, np.int64),
        rollout_id_MT3=np.full((tokens, 3), -1, np.int64),
        server_logp_MT=np.zeros(tokens, np.float32),
        topk_ids_MTK=np.full((tokens, top_k), -1, np.int64),
        topk_logp_MTK=np.full((tokens, top_k), -np.inf, np.float32),
        weight_version_MT=np.full(tokens, -1, np.int64),
        advantage_MT=np.zeros(tokens, np.float32),
        correct_MT=np.zeros(tokens, np.bool_),
        loss_weight_MT=np.zeros(tokens, np.float32),
        **pruned_columns([]),
    )


def _write(row: dict[str, np.ndarray], rollout: Rollout, start: int, segment: int) -> None:
    prompt, response = len(rollout.prompt.tokens), len(rollout.tokens)
    stop = start + rollout.num_tokens
    sequence = np.concatenate([np.asarray(rollout.prompt.tokens, np.int64), rollout.tokens.astype(np.int64)])
    row["tokens_MT"][start:stop] = sequence
    row["labels_MT"][start : stop - 1] = sequence[1:]
    row["position_MT"][start:stop] = np.arange(stop - start)
    row["segment_MT"][start:stop] = segment
    row["rollout_id_MT3"][start:stop] = rollout.key
    # Row t predicts token t + 1: the first response token is predicted at the last prompt position.
    answer = slice(start + prompt - 1, start + prompt - 1 + response)
    width = min(rollout.topk_ids.shape[1], row["topk_ids_MTK"].shape[1])
    row["mask_MT"][answer] = rollout.valid
    row["server_logp_MT"][answer] = np.where(rollout.valid, rollout.server_logp, 0.0)
    row["topk_ids_MTK"][answer, :width] = rollout.topk_ids[:, :width]
    row["topk_logp_MTK"][answer, :width] = rollout.topk_logp[:, :width]
    row["weight_version_MT"][answer] = rollout.weight_version
    row["advantage_MT"][answer] = rollout.advantage
    row["correct_MT"][answer] = rollout.correct
    row["loss_weight_MT"][answer] = rollout.loss_weight
