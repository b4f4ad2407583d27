"""tools/env.sh with a stand-in interpreter: built once, built whole, and clear when it cannot be."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENV_SH = Path(__file__).parents[2] / "tools/env.sh"
PYTHON = """#!/bin/sh
# The real interpreter, except that `-m venv` makes a folder with a stand-in and `-m pip` only takes a moment.
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo made >>"{calls}" && exit ;;
  "-m pip") {pip} ;;
  "-W ignore") exit ;;
esac
case "$2" in
  *purelib*) mkdir -p "${{0%/bin/python}}/site" && echo "${{0%/bin/python}}/site" ;;
  *) exec {real} "$@" ;;
esac
"""


class Setup:
    """A place of its own for the environment, and the interpreter to make it with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.home = folder / "home"
        self.calls = folder / "calls"
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.python("sleep 0.3; exit")

    def python(self, pip: str) -> None:
        text = PYTHON.format(calls=self.calls, pip=pip, real=sys.executable)
        self.program("python", text)

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, **env: str) -> subprocess.Popen:
        variables = {
            **os.environ,
            "JACKPOT_HOME": str(self.home),
            "JACKPOT_PYTHON": str(self.programs / "python"),
            "JACKPOT_INSTALLER": "pip",
            "PATH": f"{self.programs}:{os.environ['PATH']}",
        }
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(["bash", str(ENV_SH)], env=variables | env, **pipes)

    def run(self, **env: str) -> tuple[int, str, str]:
        process = self.start(**env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err

    def num_built(self) -> int:
        return self.calls.read_text().count("made") if self.calls.exists() else 0


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def test_two_commands_side_by_side_build_one_environment(setup):
    both = [setup.start(), setup.start()]
    done = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert len({out for out, _ in done}) == 1
    assert setup.num_built() == 1
    assert any("waiting for it" in err for _, err in done)


def test_a_finished_environment_is_used_again_and_a_half_built_one_is_not(setup):
    _, first, _ = setup.run()
    assert setup.run()[1] == first and setup.num_built() == 1
    (Path(first) / "ready").unlink()
    (Path(first) / "leftover").touch()
    assert setup.run()[1] == first and setup.num_built() == 2
    assert not (Path(first) / "leftover").exists()


def test_an_interrupted_build_is_not_ready_and_ends_pip(setup):
    setup.python(f"echo $$ >'{setup.folder}/pip'; exec sleep 300")
    process = setup.start()
    deadline = time.monotonic() + 30
    while not (setup.folder / "pip").exists() or not (setup.folder / "pip").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not list(setup.home.glob("env-*/ready"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((setup.folder / "pip").read_text()), 0)


def test_no_interpreter_says_which_one_is_needed(setup):
    code, _, err = setup.run(JACKPOT_PYTHON=str(setup.folder / "none"))
    assert code == 1
    assert "Python 3.11 or 3.12" in err and "python3-venv" in err and "JACKPOT_PYTHON" in err


def test_a_full_disk_says_how_much_is_needed(setup):
    setup.program("df", "#!/bin/sh\necho head\necho disk 100 90 2097152 50% /\n")
    code, _, err = setup.run()
    assert code == 1
    assert "2 GB are free" in err and "needs 6" in err and "JACKPOT_HOME" in err
    assert setup.num_built() == 0


def test_an_index_out_of_reach_is_told_apart_from_a_missing_package(setup):
    setup.python(
        "echo 'WARNING: Retrying (Retry(total=4)) after connection broken by NewConnectionError'; exit 1"
    )
    code, _, err = setup.run()
    assert code == 1
    assert "could not reach a package index" in err and "PIP_INDEX_URL" in err and "Falling back" not in err


def test_uv_installs_where_it_is_and_is_told_pips_settings(setup):
    settings = "global.index-url='file:///index'\\n:env:.find-links='/one /two'\\nglobal.find-links='/no'\\n"
    setup.python(
        f"""case "$*" in *config*) printf "{settings}" ;; *) echo made >>{setup.calls} ;; esac; exit"""
    )
    told = setup.folder / "told"
    words = '"$UV_DEFAULT_INDEX $UV_FIND_LINKS $*"'
    setup.program("uv", f'#!/bin/sh\n[ "$1" = --version ] || echo {words} >>{told}\n')
    code, _, err = setup.run(JACKPOT_INSTALLER="")
    assert code == 0, err
    torch, pins = told.read_text().splitlines()
    for line in (torch, pins):
        assert line.startswith("file:///index /one,/two pip install --python ")
    assert "+cpu" in torch and pins.endswith("pins.txt")
    assert setup.num_built() == 1, "pip installed something"


def test_pip_installs_what_uv_could_not(setup):
    setup.program("uv", '#!/bin/sh\n[ "$1" = --version ]\n')
    code, _, err = setup.run(JACKPOT_INSTALLER="")
    assert code == 0, err
    assert err.count("uv could not, pip tries") == 2


def test_an_installation_tells_megabytes_and_the_seconds_of_its_downloads_apart(setup):
    lines = [
        "  Downloading a-1.whl (1.5 MB)",
        "  Downloading b-1.whl (500 kB)",
        "Installing collected packages: a",
    ]
    words = "; ".join(f"echo '{line}'" for line in lines)
    setup.python(f"{words}; sleep 0.3; exit")
    code, _, err = setup.run()
    assert code == 0, err
    assert len(re.findall(r"done in \d+ s: 2 MB downloaded in \d+ s, put in place in \d+ s", err)) == 2


def test_without_a_cpu_build_the_default_one_is_installed_and_the_remedy_named(setup):
    setup.python("case \"$*\" in *+cpu*) echo 'No matching distribution'; exit 1 ;; esac; exit")
    code, _, err = setup.run()
    assert code == 0, err
    assert "JACKPOT_TORCH_INDEX" in err and "several GB" in err


def test_the_index_named_for_torch_is_asked_when_pips_own_has_no_cpu_build(setup):
    setup.python('case "$*" in *index-url*) exit ;; *+cpu*) exit 1 ;; esac; exit')
    code, _, err = setup.run(JACKPOT_TORCH_INDEX="file:///wheels")
    assert code == 0, err
    assert "from JACKPOT_TORCH_INDEX: done" in err and "Falling back" not in err


def test_sourcing_puts_the_environment_first_and_this_clone_on_the_path(setup):
    env = {**os.environ, "JACKPOT_HOME": str(setup.home), "JACKPOT_PYTHON": str(setup.programs / "python")}
    script = f'source "{ENV_SH}" && echo "$PATH" && echo "$PYTHONPATH" && command -v megatron-jackpot'
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    path, pythonpath, command = done.stdout.splitlines()
    assert path.startswith(str(setup.home)) and pythonpath.startswith(str(ENV_SH.parents[1]))
    assert command.startswith(str(setup.home))
