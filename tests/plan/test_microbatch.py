"""The largest micro-batch that `plan` names is the largest that its own arithmetic lets fit."""

import pytest

from megatron_jackpot.plan.formulas import GIB, TRAINER_RESERVE_GIB, make_plan
from megatron_jackpot.plan.microbatch import STEP, largest_microbatch, microbatch_advice
from tests.plan.test_plan import QWEN3_8B, QWEN3_17B, config_for


def bytes_at(config, tokens: int, gpus: int) -> float:
    packing = config.packing.model_copy(update={"tokens": tokens})
    return make_plan(config.model_copy(update={"packing": packing}), gpus).trainer_bytes


@pytest.mark.parametrize(("gib", "pp"), [(80, 1), (141, 1), (141, 2)])
def test_the_largest_micro_batch_fits_and_the_next_does_not_or_is_more_than_there_is(
    tmp_path, gib, pp
) -> None:
    config = config_for(
        tmp_path,
        QWEN3_8B,
        QWEN3_17B,
        precision=dict(dtype="bfloat16"),
        parallel=dict(tp=4, pp=pp),
        cluster=dict(gpus_per_node=8, gpu_memory_gib=gib, trainer_procs=8),
    )
    most, plan = largest_microbatch(config, 8), make_plan(config, 8)
    room = (gib - TRAINER_RESERVE_GIB) * GIB
    share = plan.tokens / plan.dp / (4 * pp if pp > 1 else 1)
    assert most % STEP == 0 and most >= plan.longest
    assert bytes_at(config, most, 8) <= room
    assert bytes_at(config, most + STEP, 8) > room or most + STEP > share


def test_plan_advises_larger_micro_batches_only_where_twice_as_large_ones_fit(tmp_path) -> None:
    sections = dict(precision=dict(dtype="bfloat16"), parallel=dict(tp=4))
    cluster = dict(gpus_per_node=8, gpu_memory_gib=141, trainer_procs=8)
    config = config_for(tmp_path, QWEN3_8B, QWEN3_17B, cluster=cluster, **sections)
    most = largest_microbatch(config, 8)
    for tokens, advised in ((most // 2, True), (most // 2 + STEP, False)):
        packing = config.packing.model_copy(update={"tokens": tokens})
        assert (microbatch_advice(config.model_copy(update={"packing": packing}), 8) is not None) == advised


def test_a_cluster_of_cpus_and_a_model_that_does_not_fit_get_no_advice(tmp_path) -> None:
    (tmp_path / "cpu").mkdir()
    cpu = config_for(tmp_path / "cpu", QWEN3_8B, QWEN3_17B, cluster=dict(gpus_per_node=0))
    assert largest_microbatch(cpu, 8) is None
    (tmp_path / "gpu").mkdir()
    one = dict(gpus_per_node=8, gpu_memory_gib=80, trainer_procs=1)
    assert largest_microbatch(config_for(tmp_path / "gpu", QWEN3_8B, QWEN3_17B, cluster=one), 1) is None
