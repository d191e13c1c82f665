"""JSON and YAML of others: bounded in size, depth and expansion."""

import json
import os

import pytest
import ruamel.yaml

from speechbrain_ram.data import plain
from speechbrain_ram.data.plain import (
    PlainError,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "more than 10000 values"),
        ("a: &a [*a]", "stands within itself"),
        ("[" * 5000, "more than 40 deep"),
        ("- " * 5000, "more than 40 deep"),
        ("{a: " * 5000, "more than 40 deep|line 1"),
        ("- x\n" * 20_000, "more than 10000 values"),
        ("a" * 300_000, "300000 characters"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine"),
        ("a: !new:os.system", "could not determine"),
        ("a: 1\na: 2", "duplicate key.*, line 2"),
        ("a: b: c", "line 1"),
        ("when: 2001-99-99", "month"),
        ("a: *nothing", "nothing"),
        (r'a: "\ud83d\ude00"', "surrogates not allowed"),
        (r'"\ud83d": a', "surrogates not allowed"),
        ("%YAML 9.9\n---\na", "YAML"),
        ("- &a x\n- " + "9" * 5000, "digits"),
        ("!!binary x", "base64|padding"),
        ("!!timestamp x", "timestamp"),
    ],
)
def test_yaml_that_is_refused(text, reason):
    with pytest.raises(PlainError, match=reason) as error:
        parse_yaml(text, "CKPT.yaml")
    assert str(error.value).startswith("'CKPT.yaml' ")
    assert len(str(error.value)) < 400


def test_yaml_with_aliases_within_bounds(tmp_path):
    path = tmp_path / "hyperparams.yaml"
    path.write_text("a: &a {b: 1, c: [2.5, null]}\nd: *a\ne: [*a, *a]\n")
    a = {"b": 1, "c": [2.5, None]}
    assert read_yaml(path) == {"a": a, "d": a, "e": [a, a]}


def test_a_reader_that_keeps_tags():
    data = parse_yaml("a: !new:os.system\n", "x", ruamel.yaml.YAML())
    assert data["a"].tag.value == "!new:os.system"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "recursion"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[-Infinity]", "Infinity is not a number"),
        ("9" * 5000, "digits"),
        ("{", "line 1"),
        ("", "line 1"),
    ],
)
def test_json_that_is_refused(text, reason):
    with pytest.raises(PlainError, match=f"'a.json' is not.*{reason}"):
        parse_json(text, "a.json")


def test_a_character_of_two_halves():
    """JSON may write one so; what lacks its other half is refused."""
    assert parse_json(r'"\ud83d\ude00"', "a.json") == "\U0001f600"
    assert parse_json(rb'{"\ud83d\ude00": 1}', "a.json") == {"\U0001f600": 1}
    assert parse_json(r'"\\ud83d"', "a.json") == r"\ud83d"
    # A name with the byte FF, as Python reads it.
    assert parse_json(r'"a\udcff.wav"', "a.json") == "a\udcff.wav"
    for half in (r'"\ud83d"', rb'{"a": ["\uDE00"]}', r'{"\udfff": 1}'):
        with pytest.raises(PlainError, match="surrogates not allowed"):
            parse_json(half, "a.json")


def test_what_is_no_file_or_too_long(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1, 2.5, {"a": None}]))
    assert read_json(path) == [1, 2.5, {"a": None}]
    with pytest.raises(PlainError, match=r"has 21 bytes; at most 20 are"):
        read_json(path, limit=20)
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(PlainError, match="is not a regular file"):
            read_yaml(name)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "missing")
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="line 1: not text in UTF-8"):
        read_yaml(path)


def test_many_values_are_read_within_bounds():
    text = "\n".join(f"- {i}" for i in range(plain._VALUES - 1))
    assert parse_yaml(text, "x") == list(range(plain._VALUES - 1))
