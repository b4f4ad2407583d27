"""What the tools on checkpoints share: no GPU, a progress bar, peak memory, refusals in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: these tools run on machines with and without a GPU

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_jackpot.models.convert import Report, checksums, model_bytes
from megatron_jackpot.monitor.peak_memory import PeakAnonymous

Work = Callable[[Callable[[int], None]], Report]
"""Does a conversion, calling its argument with the bytes of every tensor."""


def watched(title: str, total: int, work: Work) -> Report:
    """Run `work` under a progress bar on stderr."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        return work(lambda num_bytes: bar.advance(task, num_bytes))


def convert(title: str, source: Path, out: Path, work: Work, *, verify: bool) -> None:
    """A conversion with its parity report on stdout. Raises ValueError when what was written reads
    differently."""
    total = model_bytes(source)
    with PeakAnonymous() as memory:
        report = watched(title, total, work)
    print(f"{source} -> {out}")
    print(
        f"{len(report.tensors)} tensors, {report.num_bytes:,} bytes, none missing, none unexpected; "
        f"checksums in {out / 'conversion.json'}"
    )
    print(
        f"{report.seconds:.2f} s, {report.num_bytes / report.seconds / 1e9:.2f} GB/s; anonymous memory at "
        "its peak "
        f"{memory.added:,} bytes more than before ({memory.added / report.num_bytes:.2f} of the model), "
        f"{memory.peak:,} in all"
    )
    if verify:
        differing = report.differences(watched("reading back", total, lambda done: checksums(out, done)))
        if differing:
            raise ValueError(f"{out} reads differently: {'; '.join(differing[:5])}.")
        print("read back: every tensor equal")


def refusing(main: Callable[[], int]) -> None:
    """Exit with main's code, or with 2 and one line for an input that cannot work."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
