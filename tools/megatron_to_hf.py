"""Weights in Megatron's distributed checkpoint format as an HF folder: safetensors, index, config, tokenizer.

    python tools/megatron_to_hf.py --checkpoint FOLDER --out FOLDER [--model policy|actor] [--verify]

FOLDER is a run (its newest checkpoint), RUN/checkpoints/step-NNNNNN, or one model's folder.
"""

import argparse
from pathlib import Path

from conversion import convert, refusing

from megatron_jackpot.models.convert import megatron_to_hf
from megatron_jackpot.run.manifest import check_model_files
from megatron_jackpot.run.provenance import MODELS, find_model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint or model folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--model", choices=MODELS, help="which model of a run")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9, help="size of a safetensors file")
    verify = "check a checkpoint's files by its manifest, read --out back and compare every tensor"
    parser.add_argument("--verify", action="store_true", help=verify)
    args = parser.parse_args()
    folder = find_model(args.checkpoint, args.model)
    if args.verify and check_model_files(folder):
        print(f"{folder}: every file as its checkpoint's manifest has it")
    work = lambda done: megatron_to_hf(folder, args.out, done, shard_bytes=args.shard_bytes)  # noqa: E731
    convert("Megatron to HF", folder, args.out, work, verify=args.verify)
    return 0


if __name__ == "__main__":
    refusing(main)
