"""Records of what a file was made from."""

import os

import pytest

from speechbrain_ram.data.record import (
    RecordError,
    check,
    checksum,
    read_recorded,
    seal,
    write_recorded,
)

MADE_WITH = {"sample_rate": 8000, "format": "a"}


def test_parts_end_where_they_end():
    assert checksum("ab", "c") != checksum("a", "bc")
    assert checksum("ab") == checksum(b"ab") != checksum("ac")


def test_other_values_and_other_content():
    record = seal(MADE_WITH, b"samples")
    check(record, MADE_WITH, b"samples")
    with pytest.raises(RecordError, match=r"another sample_rate \(8000; now"):
        check(record, {**MADE_WITH, "sample_rate": 16000}, b"samples")
    with pytest.raises(RecordError, match=r"another speed \(None; now it is 1"):
        check(record, {**MADE_WITH, "speed": 1}, b"samples")
    with pytest.raises(RecordError, match="is damaged"):
        check(record, MADE_WITH, b"samqles")
    with pytest.raises(RecordError, match="is damaged"):
        check(record.replace("8000", "16000"), MADE_WITH, b"samples")


def test_written_and_read(tmp_path):
    path = tmp_path / "a"
    assert read_recorded(path, MADE_WITH) is None
    rows = [[f"é\n\udcff{i}", i] for i in range(100)]
    write_recorded(path, MADE_WITH, rows)
    assert read_recorded(path, MADE_WITH, str, int) == rows
    write_recorded(path, MADE_WITH, [])
    assert read_recorded(path, MADE_WITH, str, int) == []


DEEP = "[" * 100_000 + "]" * 100_000
NO_RECORDS = {
    "empty": "",
    "a list": "[1, 2]",
    "null": "null",
    "no values": '{"checksum": "a"}',
    "a number for values": '{"made_with": 1, "checksum": "a"}',
    "a list for a name": '{"made_with": [[[1], 2]], "checksum": "a"}',
    "deep": DEEP,
    "deep values": f'{{"made_with": {{"a": {DEEP}}}, "checksum": "a"}}',
    "many digits": f'{{"made_with": {{"a": {"9" * 5000}}}, "checksum": 1}}',
    "no number": '{"made_with": {"a": NaN}, "checksum": "a"}',
    "long": '{"made_with": {}, "checksum": "' + "a" * 2_000_000 + '"}',
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_what_is_no_record(tmp_path, name):
    with pytest.raises(RecordError, match="has no record of what"):
        check(NO_RECORDS[name], MADE_WITH)
    (tmp_path / "a").write_text(f"{NO_RECORDS[name]}\n")
    with pytest.raises(RecordError, match="has no record of what"):
        read_recorded(tmp_path / "a", MADE_WITH, str, int)


def test_messages_are_short():
    record = seal({"a" * 999: "x" * 9999})
    with pytest.raises(RecordError, match="another aaa") as caught:
        check(record, {})
    assert len(str(caught.value)) < 500


NO_ROWS = {
    "no JSON": ("rubbish", "line 2: .*not valid JSON"),
    "an object": ('{"a": 1}', "line 2: {'a': 1} is not a row"),
    "a number": ("3", "line 2: 3 is not a row"),
    "no list of lists": ('["a", 1]', "line 2: 'a' is not a row"),
    "too few values": ('[["a"]]', "line 2: .* is not a row"),
    "a list for a number": ('[["a", [1]]]', "line 2: .* is not a row"),
    "a truth value for a number": ('[["a", true]]', "line 2: .* is not a row"),
    "a fraction": ('[["a", 1.5]]', "line 2: .* is not a row"),
    "infinity": ('[["a", 1e999]]', "line 2: .*inf.* is not a row"),
    "a later line": ('[["a", 1]]\n[["b"]]', "line 3: .'b'. is not a row"),
    "many digits": (f'[["a", {"9" * 5000}]]', "line 2: .*digits"),
    "deep": (f'[["a", {DEEP}]]', "line 2: .*recursion"),
    "long": (f"[{'[], ' * 300_000}[]]", "line 2: the line is too long"),
    "wide": (f"[{'[], ' * 200_000}[]]", r"line 2: \[\] is not a row"),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_rows_of_somebody_else(tmp_path, name):
    """With a checksum that fits, which anybody can compute."""
    text, message = NO_ROWS[name]
    path = tmp_path / "a"
    path.write_text(f"{seal(MADE_WITH, text)}\n{text}")
    with pytest.raises(RecordError, match=f"damaged .{message}") as caught:
        read_recorded(path, MADE_WITH, str, int)
    assert len(str(caught.value)) < 500


def test_what_is_no_file_of_rows(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xff")
    with pytest.raises(RecordError, match="damaged .*byte 0xff"):
        read_recorded(path, MADE_WITH)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(RecordError, match="is not a regular file"):
            read_recorded(other, MADE_WITH)
    with path.open("wb") as file:  # a gigabyte, nothing of it on the disk
        file.truncate(2**30)
    with pytest.raises(RecordError, match="1073741824 bytes; at most"):
        read_recorded(path, MADE_WITH)
