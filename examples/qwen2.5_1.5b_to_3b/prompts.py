"""A file of problems as the jsonl that data.path reads: {"prompt": ..., "answer": ...} a line.

    python examples/qwen2.5_1.5b_to_3b/prompts.py PROBLEMS.json[l] OUT.jsonl

PROBLEMS is a JSON list or one object a line, with `problem` or `question`, and with `answer` or a `solution`
whose last \\boxed{} is the answer. Problems without an answer are counted and left out.
"""

import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def boxed(solution: str) -> str | None:
    """What stands in the last \\boxed{...}, braces inside included; None without one."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for end in range(begin, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[begin:end]
    return None


def main(source: Path, out: Path) -> None:
    rows, skipped = [], 0
    for entry in read(source):
        answer = entry.get("answer") or boxed(entry.get("solution", ""))
        if not answer:
            skipped += 1
            continue
        rows.append({"prompt": entry.get("problem") or entry["question"], "answer": str(answer)})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} problems in {out}, {skipped} without an answer left out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
