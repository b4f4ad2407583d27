"""Lock files, setup.py and Dockerfile agree; check_image and doctor notice what does not."""

import re
from pathlib import Path

import pytest

from megatron_jackpot.launch import doctor
from megatron_jackpot.servers import gpus
from tools.check_image import main, pins, wrong_pins

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def setup_arguments(monkeypatch) -> dict:
    """What setup.py hands to setuptools."""
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return given


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9-]+", requirement)[0].lower()


def build_argument(name: str) -> str:
    return re.search(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)[1]


def test_the_gpu_lock_holds_what_setup_asks_for(monkeypatch) -> None:
    arguments, locked = setup_arguments(monkeypatch), pins(ROOT / "requirements/gpu.txt")
    assert {name_of(r) for r in arguments["install_requires"]} <= set(locked)
    for requirement in arguments["extras_require"]["gpu"]:
        name, version = re.match(r"([a-z-]+)(?:\[.*\])?==(.+)", requirement).groups()
        assert locked[name] == version
    assert build_argument("TE_TORCH") == locked["transformer-engine"] == locked["transformer-engine-cu13"]


def test_every_pin_of_the_gpu_lock_has_a_hash_and_its_source_is_in_it() -> None:
    text, locked = (ROOT / "requirements/gpu.txt").read_text(), pins(ROOT / "requirements/gpu.txt")
    assert len(re.findall(r"==\S+ \\\n +--hash=sha256:", text)) == len(locked)
    for name, version in pins(ROOT / "requirements/gpu.in").items():
        assert locked[name] == version
    assert "apex" not in locked, "the index's apex is another project"
    assert re.fullmatch(r"[0-9a-f]{40}", build_argument("APEX_COMMIT"))


def test_the_servers_image_has_the_sglang_that_was_tested(monkeypatch) -> None:
    tested = pins(ROOT / "requirements/cpu.txt")["sglang"]
    assert build_argument("BASE_IMAGE").endswith(f":v{tested}")
    assert f"sglang>={tested}" in setup_arguments(monkeypatch)["extras_require"]["server"]


def test_an_installed_package_has_every_file_of_the_clones(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = setup_arguments(monkeypatch)
    files = [path for path in Path("megatron_jackpot").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert len(files) > 100 and {".py", ".sh", ".sbatch"} <= {path.suffix for path in files}
    for path in files:
        own = ".".join(path.parent.parts)
        # A folder whose name is no package's is data of the package above it.
        package = own if own in arguments["packages"] else ".".join(path.parent.parent.parts)
        assert package in arguments["packages"], path
        patterns = [*["*.py"] * (package == own), *arguments["package_data"].get(package, [])]
        assert any(path.match(pattern) for pattern in patterns), path


def test_no_image_runs_as_root() -> None:
    for target in ("cpu", "gpu"):
        stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert users and users[-1] not in ("root", "0")


def test_check_image_names_missing_and_other_versions(tmp_path, capsys) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# a comment==1\npyyaml==0.0.1 \\\n    --hash=sha256:00\nnot-a-package-here==2 ; python_version > "
        "'3'\n"
    )
    assert pins(lock) == {"pyyaml": "0.0.1", "not-a-package-here": "2"}
    assert len(wrong_pins(pins(lock))) == 2
    assert main(["--lock", str(lock), "--need", "no_such_module"]) == 1
    error = capsys.readouterr().err
    for part in (
        "pyyaml: pinned 0.0.1",
        "not-a-package-here: pinned 2, missing",
        "no_such_module does not import",
    ):
        assert part in error


def test_a_lock_without_pins_is_refused(tmp_path) -> None:
    (tmp_path / "lock.txt").write_text("torch>=2\n")
    with pytest.raises(ValueError, match="pins nothing"):
        pins(tmp_path / "lock.txt")


@pytest.mark.parametrize(
    ("trainer", "server", "status"),
    [
        ("2.30.7", "2.30.4", "ok"),
        ("2.30.7", "2.27.3", "broken"),
        ("2.30.7", "none", "broken"),
        ("none", "none", "ok"),
    ],
)
def test_doctor_compares_nccl_of_both_environments(tmp_path, monkeypatch, trainer, server, status) -> None:
    interpreters = {}
    for side, version in (("trainer", trainer), ("server", server)):
        interpreters[side] = tmp_path / side
        interpreters[side].write_text(f"#!/bin/sh\necho {version}\n")
        interpreters[side].chmod(0o755)
    monkeypatch.setattr("sys.executable", str(interpreters["trainer"]))
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["0"])
    attempt = doctor.attempt
    monkeypatch.setattr(doctor, "attempt", lambda code, interpreter: attempt(code, interpreter=interpreter))
    check = doctor.same_nccl(interpreters["server"])
    assert (check.status, check.detail) == (status, f"trainer {trainer}, server {server}")
