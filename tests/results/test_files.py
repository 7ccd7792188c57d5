"""Files of results: what comes back, and one error for all that is no such file."""

import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.results import files
from tests.guarding import guards
from tests.results.made import RESULTS, assert_identical, flatness, lambda_max, landscape, spectrum, trajectory

MAKE = pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)


@guards("results/files.py", "str(value) if isinstance(value, float) and not math.isfinite(value) else value", "value")
@MAKE
def test_what_was_saved_is_loaded(tmp_path, make):
    result = make()
    path = tmp_path / "of.epoch 3.npz"
    assert result.save(path) == path
    assert_identical(type(result).load(str(path)), result)


def change(path, version=files.FORMAT, **changes):
    """Rewrite a file with other fields; None leaves one out."""
    with np.load(path) as file:
        arrays = dict(file)
    record = json.loads(str(arrays.pop("record")))
    fields = {name: value for name, value in {**record["fields"], **changes}.items() if value is not None}
    np.savez(path, record=np.array(json.dumps({**record, "format": version, "fields": fields})), **arrays)


def damaged(path):
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : third + 64] = bytes(64)
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
    lambda path: change(path, version=None),
    lambda path: change(path, colour="red"),
    lambda path: change(path, layers=3, axes=3, parameters=3, info=3, name=3, coordinates=3),
    lambda path: change(path, layers={"a": {}}, num_samples=None, num_filters=None, explained=None),
    lambda path: change(
        path, **dict.fromkeys(("layers", "losses", "eigenvalues", "coordinates", "info"), "nowhere"), name=3
    ),
]


@MAKE
def test_anything_else_is_refused(tmp_path, make):
    result = make()
    path = tmp_path / "a.npz"
    for broken in BREAKS:
        result.save(path)
        broken(path)
        with pytest.raises(lf.FlatnessError, match="a.npz'"):  # the file is named
            type(result).load(path)
    with pytest.raises(FileNotFoundError):
        type(result).load(tmp_path / "none.npz")


@MAKE
def test_the_other_result_is_refused(tmp_path, make):
    result = make()
    result.save(tmp_path / "a.npz")
    for other in {lf.SpectrumResult, lf.FlatnessReport, lf.TrajectoryResult} - {type(result)}:
        with pytest.raises(lf.FlatnessError, match=f"There is a {type(result).__name__} in .*, not a {other.__name__}"):
            other.load(tmp_path / "a.npz")


def write(path, fields, arrays, **record):
    """Write a file of an earlier version, by hand."""
    np.savez(path, record=np.array(json.dumps({**record, "fields": fields})), **arrays)


def test_a_spectrum_of_format_1(tmp_path):
    result = spectrum()
    tensors = ("eigenvalues", "eigenvectors", "residuals", "ritz_values", "ritz_weights")
    fields = {name: value for name, value in vars(result).items() if name not in tensors}
    assert math.isnan(fields["trace_stderr"])  # format 1 had NaN as JSON does not
    arrays = {name: getattr(result, name).numpy() for name in tensors}
    write(tmp_path / "a.npz", fields, arrays, format=1, result="SpectrumResult")
    assert_identical(lf.SpectrumResult.load(tmp_path / "a.npz"), result)


@pytest.mark.parametrize("accuracies", [True, False])
def test_a_landscape_of_format_1(tmp_path, accuracies):
    result = landscape() if accuracies else replace(landscape(), accuracies=None, origin_accuracy=None)
    tensors = ("losses", "computed") + ("accuracies",) * accuracies
    fields = {name: value for name, value in vars(result).items() if name not in (*tensors, "coordinates")}
    arrays = {name: getattr(result, name).numpy() for name in tensors}
    arrays |= {f"coordinates_{index}": axis.numpy() for index, axis in enumerate(result.coordinates)}
    write(tmp_path / "a.npz", fields, arrays, format=1, result="LandscapeResult")
    assert_identical(lf.LandscapeResult.load(tmp_path / "a.npz"), result)


def test_a_trajectory_from_before_files_said_what_they_are(tmp_path):
    result, path = trajectory(), tmp_path / "trajectory.npz"
    np.savez(path, coordinates=result.coordinates.numpy(), explained=result.explained.numpy())
    assert_identical(lf.TrajectoryResult.load(path), result)
    np.savez(path, coordinates=result.coordinates.numpy())
    with pytest.raises(lf.FlatnessError, match="trajectory.npz' was not written by TrajectoryResult.save"):
        lf.TrajectoryResult.load(path)


def test_fields_that_were_added_later_have_their_defaults(tmp_path):
    flatness().save(tmp_path / "a.npz")
    change(tmp_path / "a.npz", loss=None, samples=None)
    loaded = lf.FlatnessReport.load(tmp_path / "a.npz")
    assert math.isnan(loaded.loss)
    assert loaded.samples == {}
    lambda_max().save(tmp_path / "a.npz")
    change(tmp_path / "a.npz", loss_name=None)
    assert lf.LambdaMaxReport.load(tmp_path / "a.npz").loss_name == ""


def test_files_are_read_without_the_package(tmp_path):
    report = flatness()
    with np.load(report.save(tmp_path / "a.npz"), allow_pickle=False) as file:
        text = str(file["record"])
        assert_close(torch.from_numpy(file["layers.2.block_traces"]), report.layers["2"].block_traces)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(text, parse_constant=refuse)["fields"]["layers"]["2"]["info"]["exact"] is True


@MAKE
def test_files_of_later_versions(tmp_path, make):
    result = make()
    result.save(tmp_path / "a.npz")
    change(tmp_path / "a.npz", version=files.FORMAT + 1)
    with pytest.raises(lf.FlatnessError, match="written by a later version"):
        type(result).load(tmp_path / "a.npz")


@MAKE
def test_names_end_with_npz(tmp_path, make):
    with pytest.raises(lf.FlatnessError, match=".npz files, but '.*a.pt' is not one"):
        make().save(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_files_are_compressed_and_hold_no_pickle(tmp_path):
    with zipfile.ZipFile(landscape().save(tmp_path / "a.npz")) as archive:
        assert "record.npy" in archive.namelist()
        assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
