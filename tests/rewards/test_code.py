"""Programs of responses against the tests of a row, and what a hostile one can do."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_jackpot.config import Data
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards import code
from megatron_jackpot.rewards.code import CodeReward, program_of
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rewards.sandbox.seal import CannotSeal, filter_of

pytestmark = pytest.mark.timeout(60)

ADD = "def f(a, b):\n    return a + b\n"
SECRET = f"secret-{secrets.token_hex(16)}"
"""What a test expects, and no program here knows."""


def reward(**changes) -> CodeReward:
    settings = Data().code.model_copy(update={"cpu_s": 1, **changes})
    return CodeReward(**settings.model_dump(), timeout_s=10.0)


@pytest.fixture(scope="module")
def judge() -> CodeReward:
    return reward()


def test_the_score_is_the_share_of_tests_that_pass_or_whether_all_do(judge):
    calls = ["assert f(1, 2) == 3", "assert f(2, 2) == 5", {"stdin": "", "stdout": ""}, "assert f(b=1, a=0)"]
    assert judge.score(ADD, {"tests": calls}) == 0.75
    assert judge.score(ADD, {"tests": json.dumps(calls)}) == 0.75
    every = reward(credit="all")
    assert every.score(ADD, {"tests": calls}) == 0.0
    assert every.score(ADD, {"tests": [*calls[:1], *calls[2:]]}) == 1.0
    assert every.verdicts(ADD, calls) == [True, False]


def test_a_script_is_judged_by_its_output_and_its_exit(judge):
    script = "a, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')\n"
    given = {"stdin": "1 2\n", "stdout": "3\n"}
    assert judge.verdicts(script, [given, {**given, "stdout": "4"}]) == [True, False]
    assert judge.verdicts(script + "1 / 0", [given]) == [False]
    assert judge.verdicts(script + "raise SystemExit", [given]) == [True]
    many = {"stdin": "7\n" * 200_000, "stdout": str(7 * 200_000) + "\n7"}
    assert judge.verdicts(
        "x = open(0).read().split()\nprint(sum(map(int, x)), x[-1], sep='\\n')", [many]
    ) == [True]
    # As much again before it reads: neither side waits for the other.
    assert judge.verdicts(
        "print('7\\n' * 200_000)\nopen(0).read()", [{**many, "stdout": "7\n" * 200_000}]
    ) == [True]


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```\nand\n```bash\nls\n```\n", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("<think>```python\nx = 1\n```", None),
        ("```python\nx = 1", None),
        ("```c\nint x;\n```", None),
        ("#" * 2**20, None),
        ("```x\n" * 20_000, None),
    ],
)
def test_the_program_is_the_last_whole_block(response, program, judge):
    assert program_of(response) == program
    if program is None:
        assert judge.score(response, {"tests": ["assert True"]}) == 0.0


def test_values_objects_and_exceptions_cross_between_program_and_tests(judge):
    program = """
import math
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
def same(x): return x
def top(stack): return stack.items[-1]
def bad(): raise KeyError("no")
class Mine(ValueError): pass
def mine(): raise Mine("mine")
LIMIT = 10 ** 5000
"""
    tests = [
        "for x in (None, True, 2.5, 1j, 'a\\ud800', b'a', [1, (2,)], {3}, frozenset({4}), {(1,): [0]}):\n"
        "    assert same(x) == x and type(same(x)) is type(x)",
        "assert LIMIT == 10 ** 5000 and same(-LIMIT) == -LIMIT and same(float('inf')) > 1",
        "s = Stack(1, 2)\ns.push(3).push(4)\nassert s.items == [1, 2, 3, 4] and top(s) == 4",
        "try:\n    bad()\nexcept KeyError as e:\n    assert 'no' in str(e)\nelse:\n    assert False",
        "try:\n    mine()\nexcept ValueError:\n    pass",
        "import math\ndef check(candidate):\n    assert math.isclose(candidate(0.1), 0.1)\ncheck(same)",
        "assert same(lambda: 1)",
        "assert missing(1)",
        "print('1' * 9, flush=True)\nassert same(2) == 2",
        "import os\nos.write(1, b'1')\nassert same(2) == 3",
    ]
    assert judge.verdicts(program, tests) == [True] * 6 + [False] * 2 + [True, False]


def test_what_programs_import_works_sealed_and_else_is_not_found(judge):
    program = """
import sys, threading
from collections import Counter, defaultdict
from datetime import datetime
from functools import lru_cache
from itertools import permutations
import heapq, random, decimal, statistics, re, hashlib
def late():
    sys.setrecursionlimit(5000)
    out = []
    thread = threading.Thread(target=lambda: out.append(datetime.strptime("2024-02-29", "%Y-%m-%d").year))
    thread.start(); thread.join()
    random.seed(0)
    return [*out, Counter("aab").most_common(1), str(decimal.Decimal(1) / 3)[:4],
            statistics.median([1, 2, 3]), re.sub("a+", "b", "caat"), hashlib.md5(b"x").hexdigest()[:4],
            heapq.nsmallest(1, [2, 1])]
def missing():
    try:
        import numpy
    except ModuleNotFoundError:
        return True
"""
    wanted = "[2024, [('a', 2)], '0.33', 2, 'cbt', '9dd4', [1]]"
    assert judge.verdicts(program, [f"assert late() == {wanted}", "assert missing()"]) == [True, True]


LOOKS = """
def f():
    import gc, re, sys
    seen, frame = [], sys._getframe()
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for one in [*seen, *gc.get_objects()]:
        try:
            found = re.search("secret-[0-9a-f]{32}", one if isinstance(one, str) else repr(one))
        except BaseException:
            continue
        if found:
            return found.group()
"""
"""Returns what the test expects where it finds it."""
HOSTILE = {
    "forks": "import os\ndef f():\n    while True: os.fork()",
    "starts a program": "import os\ndef f(): return os.popen('echo x').read()",
    "loops": "def f():\n    while True: pass",
    "loops when it is loaded": "while True: pass",
    "sleeps": "import time\ndef f(): time.sleep(60)",
    "takes memory": "def f(): return len(bytearray(2 ** 40))",
    "takes memory bit by bit": "def f():\n    x = []\n    while True: x.append(bytearray(2 ** 20))",
    "starts threads": "import threading, time\n"
    "def f():\n    while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "prints without end": "def f():\n    while True: print('x' * 10 ** 6)",
    "returns too much": "def f(): return 'x' * 10 ** 8",
    "returns a deep value": "def f():\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "writes to every pipe": "import os\ndef f():\n    for fd in range(100):\n"
    "        try: os.write(fd, b'1' * 4096)\n        except OSError: pass",
    "answers before it is asked": "import os, json\nbody = json.dumps({'f': True}).encode()\n"
    "os.write(3, len(body).to_bytes(4, 'big') + body)\nos.write(3, b'\\0\\0\\0\\2{}' * 9)",
    "equals everything": "class E(str):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(): return E('x')",
    "equals everything as an object": "class E:\n    def __eq__(self, other): return True\n"
    "def f(): return E()",
    "ends": "import sys\ndef f(): sys.exit(0)",
    "ends when it is loaded": "import os\nos._exit(0)",
    "ends by exception": "def f(): raise SystemExit(0)",
    "fails as an assertion would": "def f(): raise AssertionError",
    "looks into frames": LOOKS,
    "crashes": "import sys\ndef f():\n    sys.setrecursionlimit(10 ** 9)\n"
    "    g = lambda x: g(x) + 1\n    return g(0)",
}


SCRIPTS = {
    "prints the verdict": "import os\nprint('11111111')\nos.write(1, b'1')",
    "says nothing": "import sys; sys.exit(0)",
    "closes its output and stays": "import os, time\nprint(3)\nos.close(1)\ntime.sleep(60)",
}


def test_a_hostile_program_fails_its_own_test_and_no_other(judge):
    calls = {name: (program, [f"assert f() == {SECRET!r}"]) for name, program in HOSTILE.items()}
    output = {name: (script, [{"stdin": "1 2", "stdout": "3"}]) for name, script in SCRIPTS.items()}
    honest = {"honest": (ADD, ["assert f(1, 2) == 3"])}
    cases = {**calls, **output, **honest}
    with ThreadPoolExecutor(4) as threads:
        found = dict(zip(cases, threads.map(lambda case: judge.verdicts(*case), cases.values()), strict=True))
    assert found == {name: [name == "honest"] for name in cases}


FORGED = {
    "def set(x): return 0\ndef f(): return ()": "assert set(f()) == {4, 5}",
    "def abs(x): return 0.0\ndef f(): return 9.0": "assert abs(f() - 1.4142) < 1e-6",
    "def all(x): return True\ndef f(): return 0": "assert all([f() == 1])",
    "def it():\n    raise StopIteration\ndef f(): return it()": "for x in map(lambda _: f(), [0]):\n    pass",
    "import sys, json\nscope = sys._getframe(1).f_globals\nmake = scope['to_frame']\n"
    "def more(told):\n    scope['to_frame'] = make\n"
    "    return make({**told, '__builtins__': {}, '__name__': 'x'})\n"
    "scope['to_frame'] = more\ndef f(): return 0": "import math\nassert math.isclose(f(), 1.4142)",
}
"""Programs that put something of their own in the place of what a test takes from the language."""


def test_a_program_changes_nothing_that_a_test_takes_from_the_language(judge):
    assert [judge.verdicts(program, [test]) for program, test in FORGED.items()] == [[False]] * len(FORGED)


def test_of_a_program_whose_test_is_over_nothing_is_left():
    """Five programs of 100 MB, one after another: at no time is there more than one."""
    program = (
        "import threading, time\nclass Holds: x = bytearray(100 * 2**20)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\ndef f(): return 1"
    )
    judge = reward(cpu_s=2)
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            seen.append(held_by_programs())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert judge.verdicts(program, ["assert f() == 1"] * 5) == [True] * 5
    finally:
        done.set()
        watcher.join()
    assert 90 < max(seen) < 250 and held_by_programs() == 0, max(seen)


def held_by_programs() -> int:
    """MiB of anonymous memory in processes of the sandbox."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if b"sandbox/run.py" in (status.parent / "cmdline").read_bytes():
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                found += int(lines.get("RssAnon", "0 kB").split()[0])
        except OSError:
            continue
    return found // 1024


FORBIDDEN = {
    "open('{file}')": "reading a file",
    "open('{file}', 'w')": "writing a file",
    "os.listdir('/')": "looking at a folder",
    "os.open('/proc/self/mem', os.O_RDWR)": "its own memory as a file",
    "os.kill({pid}, 9)": "ending the trainer",
    "os.kill(os.getppid(), 9)": "ending its parent",
    "os.killpg(0, 9)": "ending its group",
    "fcntl.fcntl(0, 8, {pid})": "signals by F_SETOWN",
    "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))": "the trainer's limits",
    "resource.setrlimit(resource.RLIMIT_CPU, (9, 9))": "its own limits",
    "os.fork()": "a process",
    "os.execv('/bin/sh', ['sh'])": "another program",
    "socket.socket()": "the network",
    "os.memfd_create('x')": "memory beyond its limit",
    "os.sched_setaffinity({pid}, [0])": "the trainer's cores",
    "os.setpriority(os.PRIO_PROCESS, {pid}, 19)": "the trainer's priority",
}


def test_the_kernel_forbids_a_sealed_process_all_but_to_compute(tmp_path):
    """In a process that seals itself with every module at hand, which responses do not have."""
    file = tmp_path / "rows.jsonl"
    file.write_text(SECRET)
    lines = [
        "import fcntl, os, resource, socket, threading",
        "from megatron_jackpot.rewards.sandbox.seal import seal",
    ]
    lines += ["seal()"]
    for call in FORBIDDEN:
        asked = call.format(file=file, pid=os.getpid())
        lines += [
            "try:",
            f"    {asked}",
            f"    print({call!r})",
            "except (PermissionError, ValueError):",
            "    pass",
        ]
    lines += ["threading.Thread(target=print, args=('a thread',)).start()"]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=path, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.returncode) == ("a thread\n", 0), done.stderr
    assert file.read_text() == SECRET


def test_a_machine_that_cannot_seal_is_refused_unless_programs_are_trusted(monkeypatch):
    with pytest.raises(CannotSeal, match="no list of system calls for riscv64, only for x86_64, aarch64"):
        filter_of("riscv64")
    really = code._run
    monkeypatch.setattr(code, "_run", lambda sent, timeout_s: b"Eseccomp: Function not implemented")
    with pytest.raises(
        ValueError, match=r"cannot seal .* \(seccomp: Function not .* set data.code.trusted=true"
    ):
        reward()
    monkeypatch.setattr(code, "_run", really)
    with pytest.raises(ValueError, match="does nothing does not pass within memory_gb = 0.001"):
        reward(memory_gb=0.001)
    reads = "import os\ndef f(): return os.path.exists('/')"
    assert reward(trusted=True).verdicts(reads, ["assert f()"]) == [True]
    assert reward().verdicts(reads, ["assert f()"]) == [False]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"answer": ADD}, "needs a list 'tests' of 1 to 100, got None"),
        ({"answer": ADD, "tests": []}, "needs a list 'tests'"),
        ({"answer": ADD, "tests": "assert f(1"}, "no JSON"),
        ({"answer": ADD, "tests": ["assert True", "assert f(1"]}, "test 2 is no Python"),
        ({"answer": ADD, "tests": [{"stdin": "1"}]}, "test 1 must be statements, or"),
        ({"answer": ADD, "tests": ["assert f(1, 1) == 2", "assert f(1, 1) == 3"]}, "test 2 of 2 fails for"),
        ({"answer": "```c\n```", "tests": ["assert True"]}, "test 1 of 1 fails"),
    ],
)  # fmt: skip
def test_a_row_is_refused_whose_tests_are_none_or_fail_its_own_answer(label, message, judge):
    with pytest.raises(ValueError, match=message):
        judge.check(label)


def test_answers_need_not_be_programs():
    reward(check_answers=False).check({"answer": "-", "tests": ["assert f(1, 1) == 3"]})


def test_in_the_pool_a_program_without_end_is_wrong_and_no_failure_of_the_machinery(functions, tmp_path):
    settings = Data().code.model_copy(update={"cpu_s": 1}).model_dump()
    row = {"answer": ADD, "tests": ["assert f(1, 1) == 2", "assert f(1, 1) == 2"]}
    with RewardPool("code", 1, 3.0, code=settings) as pool:
        prompts = [Prompt(0, (), row), Prompt(1, (), {**row, "answer": "x = 1"})]
        with pytest.raises(ValueError, match="rows, line 2: test 1 of 2 fails"):
            asyncio.run(pool.check_labels(prompts, tmp_path / "rows"))
        assert asyncio.run(pool(ADD, row)) == (1.0, True)
        # For two tests it would have 6 s by the clock, where the reward has 3.
        assert asyncio.run(pool("import time\ntime.sleep(60)", row)) == (0.0, False)
        assert pool.counters == {"scored": 2, "timed_out": 0, "crashed": 0}
