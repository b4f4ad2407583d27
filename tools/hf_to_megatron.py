"""An HF model folder in Megatron's distributed checkpoint format, loadable with any tp, pp and dp.

    python tools/hf_to_megatron.py --hf FOLDER --out FOLDER [--verify]

--out holds config.json and the tokenizer too, and can be policy.hf or actor.hf of a run.
"""

import argparse
from pathlib import Path

from conversion import convert, refusing

from megatron_jackpot.models.convert import hf_to_megatron


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json and *.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--verify", action="store_true", help="read --out back and compare every tensor")
    args = parser.parse_args()
    work = lambda done: hf_to_megatron(args.hf, args.out, done)  # noqa: E731
    convert("HF to Megatron", args.hf, args.out, work, verify=args.verify)
    return 0


if __name__ == "__main__":
    refusing(main)
