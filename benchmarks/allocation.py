"""What deciding costs: a plan of each planning allocator, and the draw of further prompts, with 10,000 known
prompts, in processor time of one core.

    python benchmarks/allocation.py
"""

import random
import time
from collections.abc import Callable

from megatron_jackpot.algorithm.allocators import VIP, CoBA
from megatron_jackpot.algorithm.allocators_base import Allocator, Memory
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.records import Prompt

KNOWN = 10_000
STEPS = ((64, 8), (512, 16))
"""(prompts, rollouts of each on average) of a step."""


def best_ms(call: Callable[[], object]) -> float:
    """Of five."""
    times = []
    for _ in range(5):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    draw = random.Random(0)
    visits = {number: [(draw.randint(0, 16), 16)] * 3 for number in range(KNOWN)}
    memory = Memory(visits=visits, rates=[0.4])
    allocators: dict[str, Allocator] = {
        "vip": VIP(),
        "vip, dr_grpo": VIP(variance="dr_grpo"),
        "coba": CoBA(),
        "coba, reference": CoBA(variant="reference"),
    }
    print("| what | prompts x rollouts | ms |\n|---|---|---|")
    for name, allocator in allocators.items():
        for prompts, samples in STEPS:
            ids = draw.sample(range(KNOWN), prompts)
            taken = best_ms(lambda a=allocator, i=ids, n=samples: a.plan(i, n, memory))
            print(f"| `{name}` | {prompts} x {samples} | {taken:.1f} |")
    prompts = [Prompt(id=i, tokens=(1,), label=None) for i in range(KNOWN)]
    loader = PromptLoader(prompts, 64, 0, 1, 5)
    print(f"| 64 further prompts | of {KNOWN:,} | {best_ms(lambda: loader.further(1, 1, 64, ())):.1f} |")


if __name__ == "__main__":
    main()
