"""A disk that is full costs a checkpoint and not the run; every rank hears of it at once, whichever had the
trouble."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.sync.stream import export_hf
from megatron_jackpot.train import checkpoint
from tests.parallel.layouts import Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 8 MB, in which one or two checkpoints of the tiny models have room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine allows no mount: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _save_on_a_full_disk(rank: int, world: int, folder: str, disk: str) -> dict:
    config = make_config(Layout(), Path(folder))
    run = config.run.model_copy(update={"folder": Path(disk), "keep": 5, "save_every": 1})
    trainer = load_trainer(config.model_copy(update={"run": run}))
    state = trainer.state
    saver, seen = checkpoint.Saver(state, run, trainer.watchdog), {"bytes": checkpoint.expected_bytes(state)}
    saver.save(background=False)
    seen["first"] = sum(p.stat().st_size for p in (Path(disk) / "checkpoints").rglob("*") if p.is_file())
    state.num_steps = 1
    (Path(disk) / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 600_000))
    saver.save(background=True)
    saver.wait()
    seen["refused"] = saver.num_failed
    # Room according to the file system, but gone before everything is written.
    checkpoint.shutil = type("Lying", (), {**vars(shutil), "disk_usage": staticmethod(lambda _: _Plenty)})
    saver.save(background=True)
    saver.wait()
    seen["broke off"] = saver.num_failed
    with pytest.raises(OSError) as error:
        saver.save(background=False)
    seen["error"] = str(error.value)
    seen["left"] = sorted(p.name for p in (Path(disk) / "checkpoints").iterdir())
    checkpoint.shutil = shutil
    with pytest.raises(ValueError) as refused:
        checkpoint.check_room(state, run)
    (Path(disk) / "filler").unlink()
    saver.save(background=True)
    saver.wait()
    seen["after"] = sorted(p.name for p in (Path(disk) / "checkpoints").glob("step-*"))
    return {**seen, "gate": str(refused.value), "damage": checkpoint.resume(state, Path(disk))}


class _Plenty:
    free = 10**12


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(folder, small_disk) -> None:
    seen = run_ranks(_save_on_a_full_disk, 1, 100, str(folder), str(small_disk))[0]
    assert 0.8 < seen["first"] / seen["bytes"] < 1.6
    assert (seen["refused"], seen["broke off"]) == (1, 2)
    assert "could not be saved" in seen["error"] and "No space left" in seen["error"]
    assert seen["left"] == ["latest", "step-000000"]
    assert "two checkpoints take about" in seen["gate"]
    assert seen["after"] == ["step-000000", "step-000001"] and seen["damage"] == []


PAGE = 4096


def _fill(disk: Path, left: int) -> None:
    """Leave `left` bytes of the disk."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))


def _two_ranks_on_a_full_disk(rank: int, world: int, folder: str, disk: str, layout: Layout) -> dict:
    """What each rank saw of: metadata that finds no room, a rank's files that find none, an export that finds
    none."""
    config = make_config(layout, Path(folder))
    run = config.run.model_copy(update={"folder": Path(disk), "keep": 5, "save_every": 1})
    trainer = load_trainer(config.model_copy(update={"run": run}))
    saver, seen = checkpoint.Saver(trainer.state, run, trainer.watchdog), {}
    saver.save(background=False)
    first = Path(disk) / "checkpoints" / "step-000000"
    tensors = sum(-(-p.stat().st_size // PAGE) * PAGE for p in first.rglob("*.distcp"))
    checkpoint.shutil = type("Lying", (), {**vars(shutil), "disk_usage": staticmethod(lambda _: _Plenty)})
    for what, room in {"metadata": tensors + 3 * PAGE, "files": tensors // 2}.items():
        if rank == 0:
            _fill(Path(disk), room)
        trainer.mesh.barrier()
        with pytest.raises(OSError) as error:
            saver.save(background=False)
        seen[what] = str(error.value)
    if rank == 0:
        _fill(Path(disk), PAGE * 20)
    trainer.mesh.barrier()
    with pytest.raises(OSError) as error:
        export_hf(trainer.policy, Path(disk) / "hf")
    seen["export"] = str(error.value)
    trainer.mesh.barrier()
    seen["left"] = sorted(p.name for p in [*Path(disk).iterdir(), *(Path(disk) / "checkpoints").iterdir()])
    trainer.mesh.barrier()
    if rank == 0:
        (Path(disk) / "filler").unlink()
    trainer.mesh.barrier()
    # All are in step: what comes next works.
    saver.save(background=True)
    saver.wait()
    seen["failed"] = saver.num_failed
    destroy_mesh()
    return seen


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2)], ids=["dp 2", "tp 2"])
def test_what_finds_no_room_on_one_rank_is_heard_by_all_at_once(folder, small_disk, layout) -> None:
    ranks = run_ranks(_two_ranks_on_a_full_disk, 2, 120, str(folder), str(small_disk), layout)
    for seen in ranks:
        for what in ("metadata", "files", "export"):
            # Not that a collective waited for the other rank until its limit.
            assert "No space left on device" in seen[what], what
        assert seen["left"] == ["checkpoints", "doing", "filler", "latest", "step-000000"]
        assert seen["failed"] == 2
    assert "rank 0" in ranks[1]["export"]
