"""Speed of the converters against a plain copy of the same bytes on the same disk, each forced to the disk.

    python benchmarks/convert.py [FOLDER] [--repeat 3]

FOLDER is an HF model folder; without one a model of Qwen3-0.6B's shape with random fp32 weights (2.4 GB) is
made for the occasion. The copies and conversions go into a temporary folder beside it. Prints GB/s (medians),
the ratio to the copy, and the peak of anonymous memory: above what the process held before, and in all,
imports included. The source is read once before, so that all read it from the same cache.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_common import QWEN3_0_6B
from megatron_jackpot.models.convert import checksums, hf_to_megatron, megatron_to_hf, model_bytes
from megatron_jackpot.monitor.peak_memory import PeakAnonymous
from tests.tiny import write_model

BLOCK = 16 * 2**20


def copy(source: Path, to: Path) -> None:
    """Every file of the folder, read and written in blocks and forced to the disk, as the converters do."""
    to.mkdir()
    for path in source.iterdir():
        if path.is_file():
            with path.open("rb") as reading, (to / path.name).open("wb") as writing:
                shutil.copyfileobj(reading, writing, BLOCK)
                writing.flush()
                os.fsync(writing.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder.parent if args.folder else None) as place:
        folder = args.folder
        if folder is None:
            folder = Path(place, "model")
            # In a process of its own: its memory shall not count here.
            maker = multiprocessing.Process(target=write_model, args=(folder, 0), kwargs=QWEN3_0_6B)
            maker.start()
            maker.join()
        measure(folder, Path(place), args.repeat)


def measure(folder: Path, place: Path, repeat: int) -> None:
    size = model_bytes(folder)
    checksums(folder)
    seconds: dict[str, list[float]] = {"plain copy": [], "HF -> Megatron": [], "Megatron -> HF": []}
    added, peaks = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
    for number in range(repeat):
        here = place / str(number)
        here.mkdir()
        works = (
            lambda here=here: copy(folder, here / "copy"),
            lambda here=here: hf_to_megatron(folder, here / "megatron"),
            lambda here=here: megatron_to_hf(here / "megatron", here / "hf"),
        )
        for name, work in zip(seconds, works, strict=True):
            # Alike for all: a machine's free pages are not equally fast, those of a file just deleted are
            # warm.
            copy(folder, here / "warm")
            shutil.rmtree(here / "warm")
            with PeakAnonymous() as peak:
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
            added[name], peaks[name] = max(added[name], peak.added), max(peaks[name], peak.peak)
        shutil.rmtree(here)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table(title=f"{size / 1e9:.2f} GB, median of {repeat}")
    columns = ("seconds", "GB/s", "of the copy's speed", "anonymous, of the model", "imports included")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, median in medians.items():
        rates = f"{median:.2f}", f"{size / 1e9 / median:.2f}", f"{medians['plain copy'] / median:.2f}"
        table.add_row(name, *rates, f"{added[name] / size:.3f}", f"{peaks[name] / size:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
