"""Records of what a file was made from."""

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
    write_recorded(path, MADE_WITH, {"é\n": [1, "\udcff"]})
    assert read_recorded(path, MADE_WITH) == {"é\n": [1, "\udcff"]}
