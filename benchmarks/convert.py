"""Speed of the converters against a plain copy of the same bytes on the same disk, each forced to the disk.

    python benchmarks/convert.py FOLDER [--repeat 3]

FOLDER is an HF model folder; the copies and conversions go into a temporary folder beside it. Prints GB/s (medians)
and the ratio to the copy. The source is read once before, so that all read it from the same cache.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_jackpot.memory import PeakAnonymous
from megatron_jackpot.models.convert import checksums, hf_to_megatron, megatron_to_hf, model_bytes

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
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    size = model_bytes(args.folder)
    checksums(args.folder)
    seconds: dict[str, list[float]] = {"plain copy": [], "HF -> Megatron": [], "Megatron -> HF": []}
    memory = dict.fromkeys(seconds, 0)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as place:
        for round in range(args.repeat):
            here = Path(place, str(round))
            here.mkdir()
            works = (
                lambda here=here: copy(args.folder, here / "copy"),
                lambda here=here: hf_to_megatron(args.folder, here / "megatron"),
                lambda here=here: megatron_to_hf(here / "megatron", here / "hf"),
            )
            for name, work in zip(seconds, works, strict=True):
                with PeakAnonymous() as peak:
                    started = time.perf_counter()
                    work()
                    seconds[name].append(time.perf_counter() - started)
                memory[name] = max(memory[name], peak.added)
            shutil.rmtree(here)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table(title=f"{size / 1e9:.2f} GB, median of {args.repeat}")
    for column in ("", "seconds", "GB/s", "of the copy's speed", "peak anonymous, of the model"):
        table.add_column(column, justify="right" if column else "left")
    for name, median in medians.items():
        ratio, share = medians["plain copy"] / median, memory[name] / size
        table.add_row(name, f"{median:.2f}", f"{size / 1e9 / median:.2f}", f"{ratio:.2f}", f"{share:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
