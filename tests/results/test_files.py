"""Files of results: what comes back, and one error for all that is no such file."""

import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.results import files

BATCH = torch.linspace(-1, 1, 10).reshape(5, 2), torch.arange(5) % 3


def spectrum():
    return lf.hessian_spectrum(nn.Linear(2, 3), [BATCH], num_steps=3, num_probes=1, top_k=1)


def landscape():
    return lf.loss_landscape(nn.Linear(2, 3), [BATCH], steps=3, span=((-1, 1), (0, 1)))


RESULTS = [spectrum, landscape]


@pytest.mark.parametrize("make", RESULTS)
def test_what_was_saved_is_loaded(tmp_path, make):
    result = make()
    path = tmp_path / "of.epoch 3.npz"
    result.save(path)
    again = type(result).load(str(path))
    assert vars(again).keys() == vars(result).keys()
    for name, value in vars(result).items():
        assert type(getattr(again, name)) is type(value)
        if name == "spread":  # holds NaN
            assert repr(getattr(again, name)) == repr(value)
        elif isinstance(value, torch.Tensor) or name == "coordinates":
            assert_close(getattr(again, name), value, rtol=0, atol=0, equal_nan=True)
        elif value == value:
            assert getattr(again, name) == value


def change(path, version=files.FORMAT, **changes):
    """Rewrite a file with other fields; None leaves one out."""
    with np.load(path) as file:
        arrays = dict(file)
    record = json.loads(str(arrays.pop("record")))
    fields = {name: value for name, value in {**record["fields"], **changes}.items() if value is not None}
    np.savez(path, record=np.array(json.dumps({**record, "format": version, "fields": fields})), **arrays)


def damaged(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


def other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


BREAKS = [
    damaged,
    other_archive,
    one_array,
    lambda path: path.write_text("something else"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:200]),
    lambda path: path.write_bytes(path.read_bytes()[:-30] + bytes([255] * 30)),
    lambda path: np.savez(path, losses=np.zeros(3)),
    lambda path: np.savez(path, record=np.array([{}], dtype=object)),
    lambda path: np.savez(path, record=np.array("[1, 2]")),
    lambda path: change(path, num_samples=None),
    lambda path: change(path, version=None),
    lambda path: change(path, colour="red"),
    lambda path: change(path, axes=3, parameters=3),
]


@pytest.mark.parametrize("make", RESULTS)
def test_anything_else_is_refused(tmp_path, make):
    result = make()
    path = tmp_path / "a.npz"
    for broken in BREAKS:
        result.save(path)
        broken(path)
        with pytest.raises(lf.FlatnessError, match="a.npz'"):
            type(result).load(path)
    with pytest.raises(FileNotFoundError):
        type(result).load(tmp_path / "none.npz")


@pytest.mark.parametrize("make", RESULTS)
def test_the_other_result_is_refused(tmp_path, make):
    make().save(tmp_path / "a.npz")
    other = lf.SpectrumResult if make is landscape else lf.LandscapeResult
    with pytest.raises(lf.FlatnessError, match=f"There is a .*Result in '.*a.npz', not a {other.__name__}"):
        other.load(tmp_path / "a.npz")


@pytest.mark.parametrize("make", RESULTS)
def test_files_of_later_versions(tmp_path, make):
    result = make()
    result.save(tmp_path / "a.npz")
    change(tmp_path / "a.npz", version=files.FORMAT + 1)
    with pytest.raises(lf.FlatnessError, match="written by a later version"):
        type(result).load(tmp_path / "a.npz")


@pytest.mark.parametrize("make", RESULTS)
def test_names_end_with_npz(tmp_path, make):
    with pytest.raises(lf.FlatnessError, match="files .npz, and '.*a.pt' is not one"):
        make().save(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_files_are_compressed_and_hold_no_pickle(tmp_path):
    with zipfile.ZipFile(landscape().save(tmp_path / "a.npz")) as archive:
        assert "record.npy" in archive.namelist()
        assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
