"""Triton kernels over one rank's slice of the vocabulary. vocab_triton.py launches them.

One program reads one token's row, or with a second grid axis one block of it; nothing wider than a block
exists. Sums run against a running maximum and are rescaled when it grows, so that a single pass is enough. A
probability of 0 contributes 0 whatever it is multiplied with; NaN logits make NaN results. Rows are counted
in int64: T x V of a long micro-batch exceeds 2^31.

Logits are fp32 from the load on, whatever their dtype: a log-prob is the difference of two numbers near the
largest logit, of which bf16 keeps 8 bits. A block is summed as a tree and added to the row's sum: a row of
152k columns has some 40 additions in a chain, not 152k.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(-float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
EIGHT = tl.constexpr(8)
NONE = tl.constexpr(2**31 - 1)
"""In place of an id: beyond every one."""


@triton.jit
def finite_or_zero(peak):
    """0 in place of -inf: the reference that exponents are taken against."""
    return tl.where(peak == NEG_INF, 0.0, peak)


@triton.jit
def load_block(pointer, columns, width, per_rank, inverse_temperature):
    """Logits over the temperature in fp32, -inf beyond the true columns.

    The mask of the load is the row's own length: a multiple of 16 where the vocabulary was padded, so that 16
    bytes are read at once whatever the true width.
    """
    logits = tl.load(pointer + columns, mask=columns < per_rank, other=NEG_INF).to(tl.float32)
    return tl.where(columns < width, logits * inverse_temperature, NEG_INF)


@triton.jit
def tile_offsets(ROWS: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """Offsets [ROWS, LANES, EACH] of a block: EACH columns lie side by side, 16 bytes of them, and a lane has
    ROWS such pieces. A lane's share is in one thread, which reduces it without asking the others."""
    rows, lanes, each = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, EACH)
    return (rows[:, None, None] * LANES + lanes[None, :, None]) * EACH + each[None, None, :]


@triton.jit
def load_tile(pointer, columns, width, per_rank, TAIL: tl.constexpr):
    """A tile of logits in fp32, as `load_block` loads them where it is a row's TAIL."""
    if not TAIL:
        logits = tl.load(pointer + columns).to(tl.float32)
    else:
        logits = tl.load(pointer + columns, mask=columns < per_rank, other=NEG_INF).to(tl.float32)
        logits = tl.where(columns < width, logits, NEG_INF)
    return logits


@triton.jit
def lane_max(tile):
    return tl.max(tl.max(tile, axis=2), axis=0)


@triton.jit
def lane_sum(tile):
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def _below(tile, base):
    """tile - base of each lane, at least -1e30: its product with a probability of 0 is 0, and NaN stays."""
    return tl.maximum(tile - base[None, :, None], -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _read_block(
    pointer,
    start,
    group_ptr,
    width,
    per_rank,
    num_groups,
    peak,
    mass,
    moment,
    inverse_temperature,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """(peak, mass, moment) [LANES] after one more block. mass = sum of exp((x - peak) / temperature), moment
    the sum of that times (x - peak)."""
    logits = load_tile(pointer, start + tile_offsets(ROWS, LANES, EACH), width, per_rank, TAIL)
    piece_peak = tl.max(logits, axis=2)
    if GROUPS:
        PIECES: tl.constexpr = GROUP // EACH
        EACH_ROW: tl.constexpr = LANES // PIECES
        peaks = tl.max(tl.reshape(piece_peak, (ROWS, EACH_ROW, PIECES)), axis=2)
        group = start // GROUP + tl.arange(0, ROWS)[:, None] * EACH_ROW + tl.arange(0, EACH_ROW)[None, :]
        tl.store(group_ptr + group, peaks * inverse_temperature, mask=group < num_groups)
    new_peak = tl.maximum(peak, tl.max(piece_peak, axis=0))
    base = finite_or_zero(new_peak)
    scale = inverse_temperature * LOG2_E
    factor = tl.exp2((peak - base) * scale)
    if ENTROPY:
        below = _below(logits, base)
        prob = tl.exp2(below * scale)
        # The old sum is moved to the new peak.
        moved = moment + mass * (finite_or_zero(peak) - base)
        moment = tl.where(factor == 0.0, 0.0, factor * moved) + lane_sum(prob * below)
    else:
        prob = tl.exp2((logits - base[None, :, None]) * scale)
    return new_peak, mass * factor + lane_sum(prob), moment


@triton.jit
def read_kernel(
    logits_ptr,
    row_stride,
    ids_ptr,
    lse_ptr,
    picked_ptr,
    entropy_ptr,
    group_peak_ptr,
    first,
    width,
    per_rank,
    num_ids,
    num_groups,
    inverse_temperature,
    HAS_IDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """logsumexp of a row, its logits at ids (0 where not owned), its entropy, and the maximum of every
    group."""
    row = tl.program_id(0).to(tl.int64)
    pointer, group_ptr = logits_ptr + row * row_stride, group_peak_ptr + row * num_groups
    peak = tl.full((LANES,), NEG_INF, tl.float32)
    mass, moment = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    BLOCK: tl.constexpr = ROWS * LANES * EACH
    whole = width // BLOCK * BLOCK
    # Unrolled: whole blocks, which need no mask, then what is left of the row.
    for tail in tl.static_range(2):
        for start in range(whole if tail else 0, width if tail else whole, BLOCK):
            peak, mass, moment = _read_block(
                pointer,
                start,
                group_ptr,
                width,
                per_rank,
                num_groups,
                peak,
                mass,
                moment,
                inverse_temperature,
                tail,
                ENTROPY,
                GROUPS,
                GROUP,
                ROWS,
                LANES,
                EACH,
            )
    base = finite_or_zero(tl.max(peak, axis=0))
    factor = tl.exp2((peak - base) * inverse_temperature * LOG2_E)
    total = tl.sum(mass * factor, axis=0)
    tl.store(lse_ptr + row, base * inverse_temperature + tl.log(total))
    if ENTROPY:
        moved = moment + mass * (finite_or_zero(peak) - base)
        below = tl.sum(tl.where(factor == 0.0, 0.0, factor * moved), axis=0) * inverse_temperature
        tl.store(entropy_ptr + row, tl.where(total == 0.0, 0.0, tl.log(total) - below / total))
    if HAS_IDS:
        index = tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + row * num_ids + index, mask=index < num_ids, other=-1)
        column = ids - first
        owned = (index < num_ids) & (column >= 0) & (column < width)
        logits = tl.load(pointer + column, mask=owned, other=0.0).to(tl.float32) * inverse_temperature
        tl.store(picked_ptr + row * num_ids + index, logits, mask=index < num_ids)


@triton.jit
def best_of(values, ids):
    """(value, id) of the largest, of equal ones the lowest id; NONE where there is no id."""
    flat_values, flat_ids = tl.ravel(values), tl.ravel(ids)
    value = tl.max(flat_values, axis=0)
    return value, tl.min(tl.where(flat_values == value, flat_ids, NONE), axis=0)


@triton.jit
def next_in(pointer, value, id_, width, scale, GROUP: tl.constexpr):
    """(value, id) of the entry that follows (value, id_) in the group of id_; the best of the group for an
    infinite value. `pointer` is the row's first entry."""
    ids = tl.where(id_ == NONE, 0, id_) // GROUP * GROUP + tl.arange(0, GROUP)
    inside = ids < tl.where(id_ == NONE, 0, width)
    values = tl.load(pointer + ids, mask=inside, other=NEG_INF).to(tl.float32) * scale
    later = inside & ((values < value) | ((values == value) & (ids > id_)))
    return best_of(tl.where(later, values, NEG_INF), tl.where(later, ids, NONE))


@triton.jit
def top_kernel(
    logits_ptr,
    row_stride,
    group_peak_ptr,
    top_ptr,
    top_ids_ptr,
    first,
    width,
    num_groups,
    k,
    inverse_temperature,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k largest logits over the temperature and their ids, best first, equal ones by id; -inf and -1
    where there are no more.

    They lie in the k groups of largest maximum: whoever is in another is beaten by the best of each of those,
    equal values by their lower ids. Both selections are tournaments: the best of GROUP groups, or of a group,
    is in a register; whoever wins is followed by the next of its own GROUP, which is read again. One warp, so
    that no reduction waits.
    """
    row = tl.program_id(0).to(tl.int64)
    pointer, peaks = logits_ptr + row * row_stride, group_peak_ptr + row * num_groups
    chunk, inside = tl.expand_dims(tl.arange(0, CHUNKS), 1), tl.expand_dims(tl.arange(0, GROUP), 0)
    leader_peak = tl.full((CHUNKS, EIGHT), NEG_INF, tl.float32)
    leader = tl.full((CHUNKS, EIGHT), NONE, tl.int32)
    for index in range(0, CHUNKS):
        group = (index * EIGHT + tl.expand_dims(tl.arange(0, EIGHT), 1)) * GROUP + inside
        values = tl.load(peaks + group, mask=group < num_groups, other=NEG_INF)
        largest = tl.max(values, axis=1)
        found = (values == tl.expand_dims(largest, 1)) & (group < num_groups)
        leader_peak = tl.where(chunk == index, tl.expand_dims(largest, 0), leader_peak)
        firsts = tl.min(tl.where(found, group, NONE), axis=1)
        leader = tl.where(chunk == index, tl.expand_dims(firsts, 0), leader)
    slot = tl.arange(0, BLOCK_K)
    slot_best, slot_id = tl.full((BLOCK_K,), NEG_INF, tl.float32), tl.full((BLOCK_K,), NONE, tl.int32)
    for index in range(0, k):
        peak, group = best_of(leader_peak, leader)
        best, column = next_in(
            pointer,
            float("inf"),
            tl.where(group == NONE, NONE, group * GROUP),
            width,
            inverse_temperature,
            GROUP,
        )
        slot_best, slot_id = (
            tl.where(slot == index, best, slot_best),
            tl.where(slot == index, column, slot_id),
        )
        next_peak, next_group = next_in(peaks, peak, group, num_groups, 1.0, GROUP)
        leader_peak = tl.where(leader == group, next_peak, leader_peak)
        leader = tl.where(leader == group, next_group, leader)
    for index in range(0, k):
        best, column = best_of(slot_best, slot_id)
        tl.store(top_ptr + row * k + index, best)
        tl.store(top_ids_ptr + row * k + index, tl.where(column == NONE, -1, column + first))
        next_best, next_column = next_in(pointer, best, column, width, inverse_temperature, GROUP)
        slot_best = tl.where(slot_id == column, next_best, slot_best)
        slot_id = tl.where(slot_id == column, next_column, slot_id)


@triton.jit
def softmax_grad_kernel(
    logits_ptr,
    row_stride,
    grad_ptr,
    grad_stride,
    log_z_ptr,
    scale_ptr,
    entropy_ptr,
    width,
    per_rank,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """scale * softmax, or with ENTROPY scale * softmax * (log softmax + entropy); 0 on padding."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logp = load_block(logits_ptr + row * row_stride, columns, width, per_rank, inverse_temperature) - tl.load(
        log_z_ptr + row
    )
    slope = tl.exp(logp)
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        slope = tl.where(slope == 0.0, 0.0, slope * (logp + entropy))
    # Beyond the true columns 0 is written, even where the scale is NaN: padding must not learn. Rounded once.
    slope = tl.where(columns < width, slope * tl.load(scale_ptr + row), 0.0)
    out = grad_ptr + row * grad_stride + columns
    tl.store(out, slope.to(grad_ptr.dtype.element_ty), mask=columns < per_rank)


@triton.jit
def ids_grad_kernel(
    logits_ptr,
    row_stride,
    grad_ptr,
    grad_stride,
    ids_ptr,
    grad_ids_ptr,
    log_z_ptr,
    scale_ptr,
    first,
    width,
    num_ids,
    inverse_temperature,
    BLOCK_N: tl.constexpr,
):
    """Overwrite the gradient at ids: scale * softmax plus the sum over entries of the same id, in one
    rounding."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_N)
    inside = index < num_ids
    ids = tl.load(ids_ptr + row * num_ids + index, mask=inside, other=-1)
    given = tl.load(grad_ids_ptr + row * num_ids + index, mask=inside, other=0.0)
    column = ids - first
    owned = inside & (column >= 0) & (column < width)
    same = ids[:, None] == ids[None, :]
    total = tl.sum(tl.where(same, given[None, :], 0.0), axis=1)
    logits = tl.load(logits_ptr + row * row_stride + column, mask=owned, other=0.0).to(tl.float32)
    prob = tl.exp(logits * inverse_temperature - tl.load(log_z_ptr + row))
    slope = prob * tl.load(scale_ptr + row) + total
    tl.store(grad_ptr + row * grad_stride + column, slope.to(grad_ptr.dtype.element_ty), mask=owned)
