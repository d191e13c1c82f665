"""Valid files taken apart into fields, and put together with one changed.

Each function takes a good file and lists its changes: functions that give the
bytes of a file in which one field has a hostile value. They are called one by
one, for a list of all the bytes would be large.
"""

import contextlib
import io
import re
import sqlite3
import struct
import zipfile
from functools import partial

import fuzz_values as values
import torch


def _replaced(good, begin, end, value):
    return good[:begin] + value + good[end:]


def _at(good, spans, hostile):
    return [
        partial(_replaced, good, *span, value)
        for span in spans
        for value in hostile
    ]


def _lines(good):
    """A line less, a line twice, a line of the last, nothing at the end."""
    lines = good.splitlines(keepends=True)
    changes = [lambda: good.rstrip(b"\n"), lambda: good * 200]
    for i in range(len(lines)):
        for new in ([], [lines[i]] * 2, [lines[-1]], [b"\n"]):
            changed = [*lines[:i], *new, *lines[i + 1 :]]
            changes.append(partial(b"".join, changed))
    return changes


def columns(good):
    """Of lists: words, and what is between them."""
    words = [m.span() for m in re.finditer(rb"[^ \t\n]+", good)]
    gaps = [m.span() for m in re.finditer(rb"[ \t\n]+", good)]
    return _at(good, words, values.in_text()) + (
        _at(good, gaps, values.in_text()[-150::3]) + _lines(good)
    )


def cells(good):
    """Of CSV, or of a table with tabs."""
    spans = [m.span() for m in re.finditer(rb'"[^"]*"|[^,\t\n]+', good)]
    gaps = [m.span() for m in re.finditer(rb"[,\t]", good)]
    quoted = [
        b'"' + each.replace(b'"', b'""') + b'"' for each in values.in_text()
    ]
    return _at(good, spans, values.in_text() + quoted) + (
        _at(good, gaps, values.in_text()[::9]) + _lines(good)
    )


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|[\[\]{}]')


def json_values(good, most=60):
    """Keys, leaves, lists and objects; of a long list the first ones."""
    keys, leaves, opened = [], [], []
    for token in _TOKEN.finditer(good):
        begin, end = token.span()
        if good[begin : begin + 1] in b"[{":
            opened.append(begin)
        elif good[begin : begin + 1] in b"]}":
            leaves.append((opened.pop(), end))
        elif good[end:].lstrip()[:1] == b":":
            keys.append((begin, end))
        else:
            leaves.append((begin, end))
    leaves.sort(key=lambda span: span[0] - span[1])  # large ones first
    return _at(good, leaves[:most], values.in_json()) + (
        _at(good, keys, values.in_json_key())
    )


def yaml_values(good):
    """Values behind colons and dashes, keys, tags, lines."""
    leaf = re.compile(rb"(?<=: )[^\n#]+|(?<=- )[^\n#]+|(?<=[\[,] )[^,\]\n]+")
    spans = [m.span() for m in leaf.finditer(good)]
    keys = [m.span() for m in re.finditer(rb"[\w.]+(?=:)", good)]
    return _at(good, spans, values.in_yaml()) + (
        _at(good, keys, values.in_yaml()[::3]) + _lines(good)
    )


def words(good, begin=0, end=None, order="big"):
    """Numbers of 1, 2, 4 and 8 bytes in a part of a binary file."""
    end = len(good) if end is None else end
    changes = []
    for size in (1, 2, 4, 8):
        for place in range(begin, end - size + 1, min(size, 2)):
            span = place, place + size
            now = int.from_bytes(good[slice(*span)], order)
            changes += [
                partial(_replaced, good, *span, number.to_bytes(size, order))
                for number in values.of_bits(8 * size, now)
            ]
    return changes


def little(good, begin=0, end=None):
    return words(good, begin, end, "little")


def flac(good):
    """STREAMINFO: rate, channels, bits and length share eight bytes."""
    now = int.from_bytes(good[18:26], "big")
    changes = words(good, 4, 60)
    for shift, width in ((44, 20), (41, 3), (36, 5), (0, 36)):
        mask = (1 << width) - 1
        for number in values.of_bits(width, now >> shift & mask):
            new = now & ~(mask << shift) | number << shift
            span = good[:18], new.to_bytes(8, "big"), good[26:]
            changes.append(partial(b"".join, span))
    return changes


def ogg_sums(data):
    """The pages of an Ogg file with new checksums, as far as they go."""
    data, place = bytearray(data), 0
    while data[place : place + 4] == b"OggS" and place + 27 < len(data):
        segments = data[place + 27 : place + 27 + data[place + 26]]
        end = place + 27 + len(segments) + sum(segments)
        data[place + 22 : place + 26] = bytes(4)
        sums = 0
        for byte in data[place:end]:
            sums = (sums << 8 & 0xFFFFFFFF) ^ _CRC[sums >> 24 ^ byte]
        data[place + 22 : place + 26] = struct.pack("<I", sums)
        place = end
    return bytes(data)


def _crc(byte):
    sums = byte << 24
    for _ in range(8):
        sums = (sums << 1 ^ (0x04C11DB7 if sums >> 31 else 0)) & 0xFFFFFFFF
    return sums


_CRC = [_crc(byte) for byte in range(256)]


def moov(good):
    """Of MP4: the boxes that describe the sound."""
    begin = good.index(b"moov") - 4
    size = int.from_bytes(good[begin : begin + 4], "big")
    return words(good, 0, 40) + words(good, begin, begin + size)


def safetensors_header(good):
    """Entries of the header, whose length is written anew; that length."""
    size = int.from_bytes(good[:8], "little")
    header, tensors = good[8 : 8 + size], good[8 + size :]

    def joined(change):
        text = change()
        return struct.pack("<Q", len(text)) + text + tensors

    changes = json_values(header.rstrip(b" "))
    return [partial(joined, change) for change in changes] + little(good, 0, 8)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def state(good):
    """Values in what torch.save wrote, its keys, and its pickle."""
    known = torch.load(io.BytesIO(good), weights_only=True)
    changes = [partial(_saved, value) for value in values.in_state()]
    changes += [partial(_saved, each) for each in _varied(known)]
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    pickled = parts[name]
    places = range(2, len(pickled), max(1, len(pickled) // 40))
    for code in (b"(", b"]", b"}", b"K\0", b"N", b"0", b"2", b"t", b"R"):
        for place in places:
            new = pickled[:place] + code + pickled[place:]
            changes.append(partial(_zipped, {**parts, name: new}))
    for bomb in _PICKLES:
        changes += [partial(_zipped, {**parts, name: bomb})]
        changes += [partial(bytes, bomb)]
    return [*changes, partial(_inflated, parts)]


#: Pickles that nest, that promise gigabytes, that end early, or that call.
_PICKLES = (
    *(b"", b".", b"\x80\x09.", b"\x80\x02ccollections\nOrderedDict\n)R."),
    *(b"\x80\x02" + b"(" * 10**5 + b".", b"\x80\x02" + b"]" * 10**5 + b"."),
    b"\x80\x02]" + b"q\0h\0h\0\x86" * 1000 + b".",
    b"\x80\x04\x8d" + b"\xff" * 8 + b"a.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
    b"cos\nsystem\n(S'true'\ntR.",
    b"cfuzz_values\nexecute\n)R.",
)


def _inflated(parts):
    """A file of 300 kB, one part of which becomes 300 MB."""
    large = max(parts, key=lambda name: ("/data/" in name, name))
    return _zipped({**parts, large: bytes(3 * 10**8)}, zipfile.ZIP_DEFLATED)


def _zipped(parts, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as zipped:
        for name, content in parts.items():
            zipped.writestr(name, content)
    return file.getvalue()


def _varied(known, most=25):
    """Copies of nested dicts and lists with one key or value changed."""
    if isinstance(known, dict):
        for key in list(known)[:most]:
            rest = {k: v for k, v in known.items() if k != key}
            yield rest
            for other in ("other", 0, None, "\x1b[31m", values.LONG):
                yield {**rest, other: known[key]}
            for value in values.in_state():
                yield {**known, key: value}
            for value in _varied(known[key], 3):
                yield {**known, key: value}
    elif isinstance(known, list) and known:
        yield from ([], known * 2, known[:-1])
        for value in [*values.in_state(), *_varied(known[0], 3)]:
            yield [value, *known[1:]]


def arrays(write, good):
    """Files that `write` makes of named arrays, with one of them another."""
    changes = []
    for name, now in good.items():
        others = [now[:0], now[:1], now[..., None], now[None], now.ravel()]
        others += [now.astype(t) for t in ("f8", "i1", "i8", "u2", "?", "f2")]
        others += [now * 0, now * 0 - 1, now.repeat(2, 0), now.reshape(-1)[0]]
        with contextlib.suppress(TypeError):
            others += [now * float("nan"), now + float("inf")]
        for other in others:
            changes.append(partial(write, {**good, name: other}))
        rest = {key: value for key, value in good.items() if key != name}
        changes += [partial(write, rest), partial(write, {**good, "x": now})]
    return changes


def database(path, good, columns, sealed):
    """SQLite files with one cell, one table or the schema changed.

    `columns` are pairs of table and column; `sealed(connection)` writes
    checksums anew.
    """

    def made(statement, arguments=(), seal=False):
        path.write_bytes(good)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            with contextlib.suppress(sqlite3.Error, OverflowError):
                connection.executescript(
                    "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; "
                    "PRAGMA writable_schema = ON"
                )
                if arguments:
                    connection.execute(statement, arguments)
                else:
                    connection.executescript(statement)
                if seal:
                    sealed(connection)
        finally:
            connection.close()
        changed = path.read_bytes()
        path.unlink()
        return changed

    changes = []
    for table, column in columns:
        for seal in (False, True):
            changes += [
                partial(
                    made, f"UPDATE {table} SET {column} = ?", (value,), seal
                )
                for value in values.in_sql()
            ]
        changes += [
            partial(made, each)
            for each in (
                f"ALTER TABLE {table} DROP COLUMN {column}",
                f"ALTER TABLE {table} RENAME COLUMN {column} TO x",
                f"UPDATE {table} SET {column} = CAST(x'ff' AS TEXT)",
                f"DELETE FROM {table}",
                f"DROP TABLE {table}",
                f"DROP TABLE {table}; CREATE TABLE {table} (x)",
                f"DROP TABLE {table}; CREATE VIEW {table} AS {_ENDLESS}",
                f"ALTER TABLE {table} RENAME TO y; CREATE VIEW {table} AS "
                "SELECT y.* FROM y, y AS b, y AS c",
                f"ALTER TABLE {table} RENAME TO y; CREATE VIEW {table} AS "
                f"SELECT y.* FROM y, ({_ENDLESS})",
                f"ALTER TABLE {table} ADD COLUMN x DEFAULT (zeroblob(9))",
                f"ALTER TABLE {table} ADD COLUMN g AS (zeroblob(999999999))",
                f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN "
                f"INSERT INTO {table} {_ENDLESS}; END",
                f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN "
                "SELECT load_extension('x'); END",
                f"INSERT INTO {table} SELECT * FROM {table}",
                f"CREATE INDEX i ON {table} ({column})",
                *(
                    f"UPDATE sqlite_master SET {new} WHERE name = '{table}'"
                    for new in ("rootpage = 1", "rootpage = 99", "sql = 'x'")
                ),
                f"UPDATE sqlite_master SET sql = NULL WHERE name = '{table}'",
                "PRAGMA application_id = 0",
                "PRAGMA application_id = 7",
                "PRAGMA user_version = 7",
                "PRAGMA journal_mode = WAL",
                "PRAGMA page_size = 512; VACUUM",
                "DROP TABLE record; DROP TABLE speakers",
            )
        ]
    return changes + words(good, 16, 100)


_ENDLESS = (
    "WITH RECURSIVE n(a, b, c, d) AS (SELECT 'a', 1, x'00', 'd' UNION ALL "
    "SELECT a || b, b + 1, c, d FROM n) SELECT * FROM n"
)
