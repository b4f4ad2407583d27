"""`pip install .`, `pip install -e .` and `uv pip install .`: a command that works from any folder.

Dependencies are those of the environment that runs the tests: what is tried is the package itself.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
PARTS = ("setup.py", "README.md", "LICENSE")
ALONE = ("--no-deps", "--no-build-isolation")
PIP = (sys.executable, "-m", "pip", "--python", "{python}", "install", *ALONE)
HOWS = {
    "pip": PIP,
    "pip -e": (*PIP, "-e"),
    "uv": ("uv", "pip", "install", "--python", "{python}", "--offline", *ALONE),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What git has of the package: an installation leaves files in its source."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "megatron_jackpot"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in (*PARTS, *filter(None, listed.stdout.split("\0"))):
        place = tmp_path / "source" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place)
    return tmp_path / "source"


def files(package: Path) -> set[str]:
    every = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    return {str(path) for path in every if "__pycache__" not in path.parts}


@pytest.mark.parametrize("how", HOWS)
def test_an_installed_command_works_from_any_folder_and_lacks_no_file(how, source, tmp_path) -> None:
    if how == "uv" and shutil.which("uv") is None:
        pytest.skip("uv is not here")
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    site = Path(paths.stdout.strip())
    site.joinpath("of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [part.format(python=python) for part in HOWS[how]]
    subprocess.run([*command, source], check=True, env=env, cwd=elsewhere)
    if how != "pip -e":
        assert files(site / "megatron_jackpot") == files(source / "megatron_jackpot")
    models = [f"{name}.hf={QUICKSTART / 'models' / name}" for name in ("policy", "actor")]
    done = subprocess.run(
        [venv / "bin" / "megatron-jackpot", "plan", QUICKSTART / "run.yaml", *models],
        env=env,
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "assumed: 1 training" in done.stdout
    assert not any(elsewhere.iterdir())
