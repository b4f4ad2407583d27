"""Triton kernels over one rank's slice of two models' logits of the same tokens.

What vocab_kernels.py says of its kernels holds here; vocab_triton.py launches these too.
"""

import triton
import triton.language as tl

from megatron_jackpot.parallel.vocab_kernels import (
    LOG2_E,
    NEG_INF,
    finite_or_zero,
    lane_max,
    lane_sum,
    load_block,
    load_tile,
    tile_offsets,
)


@triton.jit
def _pair_block(
    first_row,
    second_row,
    columns,
    width,
    per_rank,
    first_peak,
    second_peak,
    first_mass,
    second_mass,
    excess,
    inverse_temperature,
    TAIL: tl.constexpr,
    KL: tl.constexpr,
):
    """Peaks, masses and excess [LANES] after one more block.

    excess = sum of p' ((x - peak of x) - (y - peak of y)), p' = exp((x - peak of x) / temperature).

    Each logit meets its own peak first: two models' offsets may be large and differ (x - y would keep few
    digits), and where the mass lies both differences are small, so that a small KL is a sum of small terms.
    """
    first = load_tile(first_row, columns, width, per_rank, TAIL)
    second = load_tile(second_row, columns, width, per_rank, TAIL)
    new_first = tl.maximum(first_peak, lane_max(first))
    new_second = tl.maximum(second_peak, lane_max(second))
    first_base, second_base = finite_or_zero(new_first), finite_or_zero(new_second)
    first_below = first - first_base[None, :, None]
    second_below = second - second_base[None, :, None]
    scale = inverse_temperature * LOG2_E
    prob = tl.exp2(first_below * scale)
    first_factor = tl.exp2((first_peak - first_base) * scale)
    if KL:
        # Without mass the ratio may be infinite, or NaN where both have none: 0 times that is NaN.
        terms = lane_sum(tl.where(prob == 0.0, 0.0, prob * (first_below - second_below)))
        excess = (
            _moved(first_peak, first_base, second_peak, second_base, first_mass, excess, first_factor) + terms
        )
    first_mass = first_mass * first_factor + lane_sum(prob)
    second_factor = tl.exp2((second_peak - second_base) * scale)
    second_mass = second_mass * second_factor + lane_sum(tl.exp2(second_below * scale))
    return new_first, new_second, first_mass, second_mass, excess


@triton.jit
def _moved(first_peak, first_base, second_peak, second_base, first_mass, excess, first_factor):
    """The excess against other peaks: each ratio moves by the same shift, each p' by the same factor.

    With the masses and peaks of before. An infinite excess under a probability that has vanished since counts
    for nothing."""
    shift = (finite_or_zero(first_peak) - first_base) - (finite_or_zero(second_peak) - second_base)
    moved = tl.where(first_mass == 0.0, 0.0, excess + first_mass * shift)
    return tl.where(first_factor == 0.0, 0.0, first_factor * moved)


@triton.jit
def pair_kernel(
    first_ptr,
    first_stride,
    second_ptr,
    second_stride,
    first_lse_ptr,
    second_lse_ptr,
    kl_ptr,
    width,
    per_rank,
    inverse_temperature,
    KL: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """logsumexp of both rows and, with KL, KL(first || second) within the slice; inf where second has 0 and
    first has not, 0 where first has no probability at all."""
    row = tl.program_id(0).to(tl.int64)
    first_row, second_row = first_ptr + row * first_stride, second_ptr + row * second_stride
    first_peak, second_peak = tl.full((LANES,), NEG_INF, tl.float32), tl.full((LANES,), NEG_INF, tl.float32)
    first_mass, second_mass = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    excess = tl.zeros((LANES,), tl.float32)
    tile = tile_offsets(ROWS, LANES, EACH)
    BLOCK: tl.constexpr = ROWS * LANES * EACH
    whole = width // BLOCK * BLOCK
    # Unrolled: whole blocks, which need no mask, then what is left of the row.
    for tail in tl.static_range(2):
        for start in range(whole if tail else 0, width if tail else whole, BLOCK):
            first_peak, second_peak, first_mass, second_mass, excess = _pair_block(
                first_row,
                second_row,
                start + tile,
                width,
                per_rank,
                first_peak,
                second_peak,
                first_mass,
                second_mass,
                excess,
                inverse_temperature,
                tail,
                KL,
            )
    scale = inverse_temperature * LOG2_E
    first_base, second_base = (
        finite_or_zero(tl.max(first_peak, axis=0)),
        finite_or_zero(tl.max(second_peak, axis=0)),
    )
    first_factor = tl.exp2((first_peak - first_base) * scale)
    first_total = tl.sum(first_mass * first_factor, axis=0)
    second_total = tl.sum(second_mass * tl.exp2((second_peak - second_base) * scale), axis=0)
    tl.store(first_lse_ptr + row, first_base * inverse_temperature + tl.log(first_total))
    tl.store(second_lse_ptr + row, second_base * inverse_temperature + tl.log(second_total))
    if KL:
        moved = _moved(first_peak, first_base, second_peak, second_base, first_mass, excess, first_factor)
        sum_of_ratios = tl.sum(moved, axis=0) * inverse_temperature
        # Without probability the second's log normaliser is taken as 0: the sum is infinite already, and
        # adding -inf would make it NaN. The first without any has share 0 in the sum over ranks: finite is
        # enough.
        second_log = tl.where(second_total == 0.0, 0.0, tl.log(second_total))
        kl = sum_of_ratios / first_total - tl.log(first_total) + second_log
        tl.store(kl_ptr + row, tl.where(first_total == 0.0, 0.0, kl))


@triton.jit
def overlap_kernel(
    first_ptr,
    first_stride,
    second_ptr,
    second_stride,
    first_log_z_ptr,
    second_log_z_ptr,
    overlap_ptr,
    width,
    per_rank,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    """sum of min(exp(first - its log Z), exp(second - its log Z)) over a row."""
    row = tl.program_id(0).to(tl.int64)
    first_log_z, second_log_z = tl.load(first_log_z_ptr + row), tl.load(second_log_z_ptr + row)
    # A sum per lane, joined at the end: the normalisers are known, so there is no peak to follow (exp of a
    # log-prob cannot overflow) and no reduction per block.
    mass = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, width, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        first = (
            load_block(first_ptr + row * first_stride, columns, width, per_rank, inverse_temperature)
            - first_log_z
        )
        second = (
            load_block(second_ptr + row * second_stride, columns, width, per_rank, inverse_temperature)
            - second_log_z
        )
        # The minimum of the logarithms: one exponential per pair. By default it would drop a NaN, and broken
        # logits would look like a model that rejects a little.
        mass += tl.exp(tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL))
    tl.store(overlap_ptr + row, tl.sum(mass, axis=0))


@triton.jit
def kl_grad_kernel(
    student_ptr,
    student_stride,
    teacher_ptr,
    teacher_stride,
    grad_ptr,
    grad_stride,
    student_log_z_ptr,
    teacher_log_z_ptr,
    kl_ptr,
    scale_ptr,
    width,
    per_rank,
    inverse_temperature,
    FORWARD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Of KL(teacher || student): student - teacher; of KL(student || teacher): student (log ratio - KL)."""
    # Normalisers and KL are those of the whole vocabulary: blocks need nothing of each other, and each has
    # its program.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    student = load_block(student_ptr + row * student_stride, columns, width, per_rank, inverse_temperature)
    teacher = load_block(teacher_ptr + row * teacher_stride, columns, width, per_rank, inverse_temperature)
    student_logp = student - tl.load(student_log_z_ptr + row)
    teacher_logp = teacher - tl.load(teacher_log_z_ptr + row)
    prob = tl.exp(student_logp)
    if FORWARD:
        slope = prob - tl.exp(teacher_logp)
    else:
        # Without probability the log ratio is infinite or NaN, and its product with 0 must be 0.
        excess = student_logp - teacher_logp - tl.load(kl_ptr + row)
        slope = tl.where(prob == 0.0, 0.0, prob * excess)
    # Beyond the true columns 0 is written, even where the scale is NaN: padding must not learn. Rounded once.
    slope = tl.where(columns < width, slope * tl.load(scale_ptr + row), 0.0)
    out = grad_ptr + row * grad_stride + columns
    tl.store(out, slope.to(grad_ptr.dtype.element_ty), mask=columns < per_rank)
