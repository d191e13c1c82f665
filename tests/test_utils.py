"""Files and folders that are complete or not there; numbers in text."""

import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from speechbrain_ram.utils import (
    atomic_folder,
    atomic_path,
    number,
    whole_number,
)


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whatever_writes_a_file_it_gets_the_usual_mode(tmp_path, umask):
    """safetensors alone would let nobody else read it."""
    with atomic_path(tmp_path / "a") as temporary:
        assert not temporary.exists()
        save_file({"x": np.zeros(3)}, temporary)
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == 0o666 & ~umask


def test_a_folder_gets_the_usual_mode(tmp_path, umask):
    with atomic_folder(tmp_path / "a"):
        pass
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == 0o777 & ~umask


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "file").write_text("old")
    with (
        pytest.raises(ZeroDivisionError),
        atomic_folder(folder, replace=True) as temporary,
    ):
        (temporary / "file").write_text("new")
        raise ZeroDivisionError
    with pytest.raises(OSError), atomic_folder(folder):
        pass  # it holds something, and was not to be replaced
    assert (folder / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("text", ["0", "-17", "+5", " 24000 ", "9" * 18])
def test_whole_numbers(text):
    assert whole_number(text) == int(text)


@pytest.mark.parametrize(
    "text", ["0", "1.5", "-.5", "5.", "1e-3", "+2E5 ", "0." + "3" * 60]
)
def test_numbers(text):
    assert number(text) == float(text)


NO_NUMBERS = ["", " ", "1_0", "٣", "１２", "nan", "inf", "-inf", "1 0", "0x10"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1.5", "1e3", "9" * 400])
def test_what_is_no_whole_number(text):
    with pytest.raises(ValueError, match="is not a whole number") as caught:
        whole_number(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "text", [*NO_NUMBERS, ".", "e5", "1e", "1e999", "9" * 400, "0" * 10**6]
)
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="is not a finite number") as caught:
        number(text)
    assert len(str(caught.value)) < 100
