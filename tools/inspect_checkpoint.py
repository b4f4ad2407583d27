"""What a model folder holds: step, config, and every tensor by HF name with shape, dtype and checksum.

    python tools/inspect_checkpoint.py FOLDER [OTHER] [--model policy|actor]

A folder is a run, RUN/checkpoints/step-NNNNNN, a model in Megatron's format or an HF folder; equal weights
have equal lines in all of them. With OTHER only the differences are printed, in config.json and in tensors.
Exit code: 0 equal or nothing to compare, 1 different, 2 an input that cannot be read.
"""

import argparse
import json
from pathlib import Path

from conversion import refusing, watched

from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.models.convert import Report, checksums, model_bytes
from megatron_jackpot.models.dist_folder import is_dist_folder
from megatron_jackpot.run.provenance import MODELS, find_model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--model", choices=MODELS, help="which model of a run")
    args = parser.parse_args()
    folder = find_model(args.folder, args.model)
    mine = read(folder)
    if args.other is None:
        show(folder, mine)
        return 0
    other = find_model(args.other, args.model)
    lines = config_differences(folder, other) + mine.differences(read(other))
    print(*lines, f"{len(lines)} differences between {folder} and {other}", sep="\n")
    return int(bool(lines))


def read(folder: Path) -> Report:
    return watched(str(folder), model_bytes(folder), lambda done: checksums(folder, done))


def show(folder: Path, report: Report) -> None:
    kind = "Megatron distributed checkpoint" if is_dist_folder(folder) else "HF folder"
    print(f"{folder}: {kind}, {len(report.tensors)} tensors, {report.num_bytes:,} bytes")
    state = folder.parent / "state.json"
    print(f"step: {json.loads(state.read_text())['num_steps'] if state.is_file() else 'none, weights only'}")
    print(f"config: {json.dumps(read_hf_config(folder), sort_keys=True)}")
    width = max(map(len, report.tensors))
    for name, entry in report.tensors.items():
        print(f"{name:<{width}}  {str(entry['shape']):<16}  {entry['dtype']:<9}  {entry['crc32']}")


def config_differences(folder: Path, other: Path) -> list[str]:
    mine, theirs = read_hf_config(folder), read_hf_config(other)
    return [
        f"config.json {key}: {mine.get(key, 'absent')!r} | {theirs.get(key, 'absent')!r}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


if __name__ == "__main__":
    refusing(main)
