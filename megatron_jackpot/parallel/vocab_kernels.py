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


@triton.jit
def _finite(peak):
    """0 in place of -inf: the reference that exponents are taken against."""
    return tl.where(peak == NEG_INF, 0.0, peak)


@triton.jit
def _load(pointer, columns, width, per_rank, inverse_temperature):
    """Logits over the temperature in fp32, -inf beyond the true columns.

    The mask of the load is the row's own length: a multiple of 16 where the vocabulary was padded, so that 16
    bytes are read at once whatever the true width.
    """
    logits = tl.load(pointer + columns, mask=columns < per_rank, other=NEG_INF).to(tl.float32)
    return tl.where(columns < width, logits * inverse_temperature, NEG_INF)


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
    BLOCK_V: tl.constexpr,
):
    """logsumexp of a row, its logits at ids (0 where not owned), its entropy, and the maximum of every
    group."""
    row = tl.program_id(0).to(tl.int64)
    pointer = logits_ptr + row * row_stride
    peak, mass, moment = tl.full((), NEG_INF, tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        logits = _load(pointer, columns, width, per_rank, inverse_temperature)
        if GROUPS:
            peaks = tl.max(tl.reshape(logits, (BLOCK_V // GROUP, GROUP)), axis=1)
            group = start // GROUP + tl.arange(0, BLOCK_V // GROUP)
            tl.store(group_peak_ptr + row * num_groups + group, peaks, mask=group < num_groups)
            block_peak = tl.max(peaks, axis=0)
        else:
            block_peak = tl.max(logits, axis=0)
        new_peak = tl.maximum(peak, block_peak)
        base = _finite(new_peak)
        prob = tl.exp(logits - base)
        factor = tl.exp(peak - base)
        if ENTROPY:
            # sum of exp(x - peak) (x - peak): the old sum is moved to the new peak.
            terms = tl.where(prob == 0.0, 0.0, prob * (logits - base))
            moved = moment + mass * (_finite(peak) - base)
            moment = tl.where(factor == 0.0, 0.0, factor * moved) + tl.sum(terms, axis=0)
        mass = mass * factor + tl.sum(prob, axis=0)
        peak = new_peak
    tl.store(lse_ptr + row, _finite(peak) + tl.log(mass))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(mass == 0.0, 0.0, tl.log(mass) - moment / mass))
    if HAS_IDS:
        index = tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + row * num_ids + index, mask=index < num_ids, other=-1)
        column = ids - first
        owned = (index < num_ids) & (column >= 0) & (column < width)
        logits = tl.load(pointer + column, mask=owned, other=0.0).to(tl.float32) * inverse_temperature
        tl.store(picked_ptr + row * num_ids + index, logits, mask=index < num_ids)


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
    logp = _load(logits_ptr + row * row_stride, columns, width, per_rank, inverse_temperature) - tl.load(
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
    BLOCK_V: tl.constexpr,
):
    """logsumexp of both rows and, with KL, KL(first || second) within the slice; inf where second has 0 and
    first has not, 0 where first has no probability at all."""
    row = tl.program_id(0).to(tl.int64)
    first_peak, second_peak = tl.full((), NEG_INF, tl.float32), tl.full((), NEG_INF, tl.float32)
    first_mass, second_mass, excess = (
        tl.zeros((), tl.float32),
        tl.zeros((), tl.float32),
        tl.zeros((), tl.float32),
    )
    for start in range(0, width, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        first = _load(first_ptr + row * first_stride, columns, width, per_rank, inverse_temperature)
        second = _load(second_ptr + row * second_stride, columns, width, per_rank, inverse_temperature)
        new_first = tl.maximum(first_peak, tl.max(first, axis=0))
        new_second = tl.maximum(second_peak, tl.max(second, axis=0))
        first_base, second_base = _finite(new_first), _finite(new_second)
        prob = tl.exp(first - first_base)
        first_factor = tl.exp(first_peak - first_base)
        if KL:
            # excess = sum of p' ((x - peak of x) - (y - peak of y)), p' = exp(x - peak of x). Each logit
            # meets its own peak first: two models' offsets may be large and differ (x - y would keep few
            # digits), and where the mass lies both differences are small, so that a small KL is a sum of
            # small terms.
            ratio = (first - first_base) - (second - second_base)
            # Without mass the ratio may be infinite, or NaN where both have none: 0 times that is NaN.
            terms = tl.sum(tl.where(prob == 0.0, 0.0, prob * ratio), axis=0)
            # The old terms were taken against the old peaks: each ratio moves by the same `shift`, each p' by
            # the same factor, with the masses and peaks of before: those are updated last.
            shift = (_finite(first_peak) - first_base) - (_finite(second_peak) - second_base)
            moved = tl.where(first_mass == 0.0, 0.0, excess + first_mass * shift)
            # An infinite excess under a probability that has vanished since counts for nothing.
            excess = tl.where(first_factor == 0.0, 0.0, first_factor * moved) + terms
        first_mass = first_mass * first_factor + tl.sum(prob, axis=0)
        second_factor = tl.exp(second_peak - second_base)
        second_mass = second_mass * second_factor + tl.sum(tl.exp(second - second_base), axis=0)
        first_peak, second_peak = new_first, new_second
    tl.store(first_lse_ptr + row, _finite(first_peak) + tl.log(first_mass))
    tl.store(second_lse_ptr + row, _finite(second_peak) + tl.log(second_mass))
    if KL:
        # Without probability the second's log normaliser is taken as 0: the sum is infinite already, and
        # adding -inf would make it NaN. The first without any has share 0 in the sum over ranks: finite is
        # enough.
        second_log = tl.where(second_mass == 0.0, 0.0, tl.log(second_mass))
        kl = excess / first_mass - tl.log(first_mass) + second_log
        tl.store(kl_ptr + row, tl.where(first_mass == 0.0, 0.0, kl))


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
            _load(first_ptr + row * first_stride, columns, width, per_rank, inverse_temperature) - first_log_z
        )
        second = (
            _load(second_ptr + row * second_stride, columns, width, per_rank, inverse_temperature)
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
    student = _load(student_ptr + row * student_stride, columns, width, per_rank, inverse_temperature)
    teacher = _load(teacher_ptr + row * teacher_stride, columns, width, per_rank, inverse_temperature)
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
