"""A stranger's folder in Megatron's format runs no code, whichever of its pickles tries to."""

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_jackpot.models.convert import hf_to_megatron
from megatron_jackpot.models.dist_folder import DistFolder
from megatron_jackpot.models.pickles import check_pickles
from tests.models.hf_models import write_hf


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_to_megatron(write_hf(tmp_path / "hf", "qwen2"), tmp_path / "megatron")
    return tmp_path / "megatron"


def _metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def _in_metadata(folder: Path, ran: Path) -> None:
    metadata = _metadata(folder)
    metadata.planner_data = Touch(ran)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _by_computed_names(folder: Path, ran: Path) -> None:
    """Module and name reach STACK_GLOBAL through the memo, beside an innocent string."""
    command = f"touch {ran}".encode()
    (folder / ".metadata").write_bytes(
        b"\x80\x04\x8c\x06system\x94\x8c\x05posix\x94\x8c\x0bcollections\x94000"
        b"h\x01h\x00\x93X" + struct.pack("<I", len(command)) + command + b"\x85R."
    )


def _by_a_dotted_name(folder: Path, ran: Path) -> None:
    """From an allowed class to whatever its module has imported."""
    module = "torch.distributed.checkpoint.filesystem"
    name = "_StorageInfo.__init__.__globals__"
    (folder / ".metadata").write_bytes(
        b"\x80\x04X" + struct.pack("<I", len(module)) + module.encode()
        + b"X" + struct.pack("<I", len(name)) + name.encode() + b"\x93."
    )  # fmt: skip


def _by_attributes_of_a_class(folder: Path, ran: Path) -> None:
    """BUILD on a class and not on an instance would change the class for everyone."""
    (folder / ".metadata").write_bytes(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x07\x00\x00\x00__len__K\x01stb."
    )


def _in_common(folder: Path, ran: Path) -> None:
    torch.save({"optimizer": Touch(ran)}, folder / "common.pt")


def _in_bytes(folder: Path, ran: Path) -> None:
    """A tensor of the model is declared to be bytes, which loaders unpickle without a check."""
    content = io.BytesIO()
    torch.save([Touch(ran)], content)
    metadata = _metadata(folder)
    index, place = next(iter(metadata.storage_data.items()))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    place.offset, place.length = 0, len(content.getvalue())
    (folder / place.relative_path).write_bytes(content.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _elsewhere(folder: Path, ran: Path) -> None:
    metadata = _metadata(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../hf/model.safetensors"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS: dict[Callable, str] = {
    _in_metadata: r"\.metadata is not loaded, it could run code: it names posix\.system",
    _by_computed_names: r"\.metadata is not loaded, it could run code: it names posix\.system",
    _by_a_dotted_name: r"it names torch\.distributed\.checkpoint\.filesystem\._StorageInfo\.__init__",
    _by_attributes_of_a_class: r"\.metadata is not loaded, it could run code: it names attributes of a type",
    _in_common: r"common\.pt is not loaded, it could run code: .*posix\.system",
    _in_bytes: r"distcp \(.*\) is not loaded, it could run code: .*posix\.system",
    _elsewhere: r"places data in '\.\./hf/model\.safetensors', outside its folder",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
def test_a_made_up_folder_is_refused_by_name_and_runs_nothing(folder: Path, tmp_path: Path, attack) -> None:
    check_pickles(folder)
    ran = tmp_path / "ran"
    attack(folder, ran)
    with pytest.raises(ValueError, match=ATTACKS[attack]):
        check_pickles(folder)
    assert not ran.exists() and not hasattr(Metadata, "__len__")


@pytest.mark.parametrize("attack", [_in_metadata, _by_computed_names])
def test_the_tools_own_reader_refuses_it_too(folder: Path, tmp_path: Path, attack) -> None:
    attack(folder, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"names posix\.system"):
        DistFolder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("attack", [_in_metadata, _by_computed_names])
def test_torchs_reader_would_have_run_it(folder: Path, tmp_path: Path, attack) -> None:
    attack(folder, tmp_path / "ran")
    try:
        dcp.FileSystemReader(folder).read_metadata()
    except AttributeError:
        pass  # What it made is no Metadata; it ran all the same.
    assert (tmp_path / "ran").exists()
