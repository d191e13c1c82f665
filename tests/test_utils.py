"""What all parts use: whole files, numbers in text, threads, processes."""

import os
import shlex
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from speechbrain_ram.utils import (
    all_numbers,
    atomic_folder,
    atomic_path,
    first_ten,
    gathered,
    in_threads,
    install_command,
    json_text,
    leave_group,
    n_processes,
    n_threads,
    needs_extra,
    number,
    of_rank_0,
    rank,
    together,
    wait_for_all,
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


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"1")
        assert not path.exists()
    assert path.read_bytes() == b"1"
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_folder_replaces_another_where_that_is_asked(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "a", replace=True) as temporary:
            (temporary / text).touch()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["new"]


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


def test_json_has_no_infinity():
    text = json_text({0.01: [1.5, float("inf"), (float("nan"),)]})
    assert text == '{"0.01": [1.5, null, [null]]}'


def test_ten_names_are_shown():
    assert first_ten("ab") == "a, b"
    assert first_ten("abcdefghijkl", "") == "abcdefghijand 2 more"


def test_what_is_missing_is_named_with_its_extra():
    with (
        pytest.raises(ImportError, match=r"A plot needs .*-ram\[report\]"),
        needs_extra("A plot", "report"),
    ):
        raise ImportError("No module named 'matplotlib'")


def test_an_extra_of_a_clone_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(
        "speechbrain_ram.utils.distributions", lambda name: iter(())
    )
    words = shlex.split(install_command("m4a"))
    assert words[:2] == ["pip", "install"] and words[2].endswith("[m4a]")
    assert (Path(words[2].removesuffix("[m4a]")) / "setup.py").is_file()


def test_threads():
    assert n_threads("cuda:0") == 2
    assert n_threads("cpu", 3) == 3
    with pytest.raises(ValueError, match="threads is 0, allowed is 1 or more"):
        n_threads("cpu", 0)
    for threads in (1, 2):
        assert list(in_threads(abs, [-2, 1, -3], threads)) == [2, 1, 3]


def test_one_process_waits_for_nobody():
    assert (n_processes(), rank()) == (1, 0)
    assert gathered("a") == ["a"]
    assert all_numbers((1, 2)) == [(1, 2)]
    assert together(lambda: 3) == [3]
    assert of_rank_0(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        of_rank_0(lambda: 1 // 0)
    wait_for_all()
    leave_group()


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
