"""Tests of the enrolment database."""

import contextlib
import multiprocessing
import os
import resource
import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_ram.data.record import checksum
from speechbrain_ram.verification import enrolment
from speechbrain_ram.verification.enrolment import (
    EnrolmentDatabase,
    EnrolmentError,
)


def _open(folder, dim=8, fingerprint="f00d", **options):
    return EnrolmentDatabase(folder / "who.db", fingerprint, dim, **options)


def _random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_a_model_is_the_mean_of_unit_vectors(tmp_path):
    embeddings = _random((3, 8)) * [[1.0], [50.0], [0.01]]
    database = _open(tmp_path)
    assert database.enrol("ada", embeddings[:2]) == 2
    assert database.enrol("ada", embeddings[2]) == 3
    assert database.speakers() == {"ada": 3}
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    model = units.mean(axis=0)
    test = _random(8, seed=1)
    expected = model @ test / np.linalg.norm(model) / np.linalg.norm(test)
    assert database.score("ada", test) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(speakers=st.integers(1, 40), top=st.integers(1, 50))
def test_identify_is_a_sort_of_all_cosines(tmp_path_factory, speakers, top):
    database = _open(tmp_path_factory.mktemp("db"))
    models = _random((speakers, 8), seed=speakers)
    database.enrol_many({f"s{i:02d}": m for i, m in enumerate(models)})
    test = _random(8, seed=99)
    cosines = models @ test / np.linalg.norm(models, axis=1)
    cosines /= np.linalg.norm(test)
    best = np.argsort(-cosines)[:top]
    found = database.identify(test, top=top)
    assert [match.name for match in found] == [f"s{i:02d}" for i in best]
    np.testing.assert_allclose(
        [match.score for match in found], cosines[best], atol=1e-6
    )


def test_names_break_ties(tmp_path):
    database = _open(tmp_path, dim=2)
    names = [f"s{i:03d}" for i in range(150)]
    models = {name: np.eye(2)[int(name[1:]) % 2] for name in names}
    database.enrol_many(models)
    found = database.identify(np.array([2.0, 0.0]), top=100)
    assert [m.name for m in found] == names[0::2] + names[1:50:2]
    assert [m.score for m in found] == [1.0] * 75 + [0.0] * 25


def test_it_is_all_in_the_file(tmp_path):
    _open(tmp_path).enrol("ada", np.eye(8)[0])
    moved = tmp_path / "elsewhere.db"
    (tmp_path / "who.db").rename(moved)
    again = EnrolmentDatabase(moved, "f00d", 8)
    assert again.identify(np.eye(8)[0])[0].name == "ada"


def test_a_reader_sees_what_another_wrote(tmp_path):
    reader, writer = _open(tmp_path), _open(tmp_path)
    writer.enrol("ada", np.eye(8)[0])
    assert [m.name for m in reader.identify(np.ones(8))] == ["ada"]
    writer.enrol("bob", np.eye(8)[1])
    assert [m.name for m in reader.identify(np.ones(8))] == ["ada", "bob"]
    writer.remove("ada")
    assert [m.name for m in reader.identify(np.ones(8))] == ["bob"]
    cached = reader.models()[1]
    assert reader.models()[1] is cached  # unchanged, so not read again


def _same_for_sqlite(path):
    """What is on disk of inode and change counter, to compare two files by."""
    return path.stat().st_ino, path.read_bytes()[24:28]


def test_deleted_speakers_are_not_found_where_the_inode_comes_back(tmp_path):
    """Another file in the place of the first, alike in all SQLite counts."""
    path, other = tmp_path / "who.db", tmp_path / "other" / "who.db"
    other.parent.mkdir()
    _open(tmp_path).enrol_many({"ada": np.eye(8)[0], "bob": np.eye(8)[1]})
    _open(other.parent).enrol_many({"bob": np.eye(8)[1]})
    reader = _open(tmp_path)
    assert [m.name for m in reader.identify(np.ones(8))] == ["ada", "bob"]
    before = _same_for_sqlite(path)
    path.write_bytes(other.read_bytes())  # as an inode that is used again
    assert _same_for_sqlite(path) == before
    assert [m.name for m in reader.identify(np.ones(8))] == ["bob"]


def test_a_restored_copy_that_went_another_way_is_seen(tmp_path):
    """The same file with as many writes, but other ones."""
    path, reader = tmp_path / "who.db", _open(tmp_path)
    reader.enrol("ada", np.eye(8)[0])
    copy = path.read_bytes()
    reader.enrol("bob", np.eye(8)[1])
    assert [m.name for m in reader.identify(np.ones(8))] == ["ada", "bob"]
    before = _same_for_sqlite(path)
    path.write_bytes(copy)
    _open(tmp_path).remove("ada")
    assert _same_for_sqlite(path) == before
    with pytest.raises(EnrolmentError, match="Nobody is enrolled"):
        reader.identify(np.ones(8))


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM speakers WHERE name = 'ada'",
        "DELETE FROM speakers",
        "UPDATE speakers SET name = 'eve' WHERE name = 'ada'",
    ],
)
def test_what_another_program_writes_is_seen(tmp_path, statement):
    database = _open(tmp_path)
    database.enrol_many({"ada": np.eye(8)[0], "bob": np.eye(8)[1]})
    assert database.score("ada", np.eye(8)[0]) == 1.0
    raw = sqlite3.connect(tmp_path / "who.db")
    raw.execute("PRAGMA journal_mode = WAL")  # which leaves the counter alone
    with raw:
        raw.execute(statement)
    with pytest.raises(EnrolmentError, match="Nobody called 'ada'|is damaged"):
        database.score("ada", np.eye(8)[0])
    raw.close()


def _enrol_many(path, worker, start):
    start.wait()
    database = EnrolmentDatabase(path, "f00d", 8)
    for i in range(10):
        database.enrol(f"only-{worker}-{i}", np.eye(8)[worker])
        database.enrol("shared", np.eye(8)[worker])


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [
        context.Process(
            target=_enrol_many, args=(tmp_path / "who.db", worker, start)
        )
        for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    database = _open(tmp_path)
    assert len(database.speakers()) == 3 * 10 + 1
    assert database.speakers()["shared"] == 30
    expected = np.eye(8)[0] @ np.eye(8)[:3].sum(axis=0) / np.sqrt(3)
    assert database.score("shared", np.eye(8)[0]) == pytest.approx(expected)


def test_reading_and_writing_back_cannot_be_interleaved(tmp_path):
    databases = [_open(tmp_path), _open(tmp_path)]
    databases[0].enrol("ada", np.eye(8)[0])
    both_have_read = threading.Barrier(2)
    failures = []

    def enroll(database):
        total = database._total

        def wait_for_the_other(*row):
            with contextlib.suppress(threading.BrokenBarrierError):
                both_have_read.wait(timeout=0.3)
            return total(*row)

        database._total = wait_for_the_other
        try:
            database.enrol("ada", np.eye(8)[0])
        except EnrolmentError as error:
            failures.append(error)

    threads = [threading.Thread(target=enroll, args=[d]) for d in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert databases[0].speakers() == {"ada": 3}


def test_a_writer_waits_and_then_says_so(tmp_path):
    database = _open(tmp_path, timeout=0.1)
    database.enrol("ada", np.eye(8)[0])
    other = sqlite3.connect(tmp_path / "who.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(EnrolmentError, match=r"be writing for over 0\.1 s"):
        database.enrol("bob", np.eye(8)[1])
    other.rollback()
    other.close()
    assert database.enrol("bob", np.eye(8)[1]) == 1


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    database = _open(tmp_path)
    both = {"ada": np.eye(8)[:1], "bob": np.eye(8)[1:2]}
    database.enrol_many(both)
    total, calls = database._total, []

    def fails_the_second_time(*row):
        calls.append(row)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return total(*row)

    with monkeypatch.context() as patch:
        patch.setattr(database, "_total", fails_the_second_time)
        with pytest.raises(OSError, match="No space"):
            database.enrol_many(both)
    assert database.speakers() == {"ada": 1, "bob": 1}
    with pytest.raises(EnrolmentError, match="'cy'"):
        database.enrol_many({"dan": np.ones((1, 8)), "cy": np.ones((0, 8))})
    assert database.speakers() == {"ada": 1, "bob": 1}


@pytest.mark.parametrize(("fingerprint", "dim"), [("beef", 8), ("f00d", 16)])
def test_another_encoder_is_refused(tmp_path, fingerprint, dim):
    _open(tmp_path).enrol("ada", np.eye(8)[0])
    with pytest.raises(EnrolmentError, match="was made with another (enc|num)"):
        _open(tmp_path, dim=dim, fingerprint=fingerprint)


def test_another_format_is_refused(tmp_path, monkeypatch):
    _open(tmp_path).enrol("ada", np.eye(8)[0])
    monkeypatch.setattr(enrolment, "_FORMAT", "speechbrain-ram enrolment 3")
    with pytest.raises(EnrolmentError, match="another format .*2; now it is"):
        _open(tmp_path)
    raw = sqlite3.connect(tmp_path / "who.db")
    raw.execute(f"PRAGMA application_id = {0x53424152}")  # of format 1
    raw.close()
    with pytest.raises(EnrolmentError, match="or one of an older version"):
        _open(tmp_path)


def test_other_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "who.db"
    path.write_text("name,embedding\n" * 100)
    with pytest.raises(EnrolmentError, match="not an enrolment database"):
        _open(tmp_path)
    assert path.read_text().startswith("name,embedding")
    path.unlink()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE other (x)")
    raw.close()
    with pytest.raises(EnrolmentError, match="not an enrolment database"):
        _open(tmp_path)


def test_damage_is_seen(tmp_path):
    """A flipped bit in a model, or around it, gives no other answer."""
    database, probe = _open(tmp_path), _random(8, seed=1)
    database.enrol("ada", _random(8))
    answer, path = database.identify(probe), tmp_path / "who.db"
    raw = sqlite3.connect(path)
    (total,) = raw.execute("SELECT total FROM speakers").fetchone()
    raw.close()
    whole, refused = path.read_bytes(), set()
    start = whole.index(total)
    for bit in range(8 * (start - 9), 8 * (start + 64)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert _open(tmp_path).identify(probe) == answer
        except EnrolmentError:
            refused.add(bit // 8)
    assert refused >= set(range(start, start + 64))  # model and checksum
    path.write_bytes(whole.replace(total, total[::-1]))
    for call in (database.identify, lambda x: database.enrol("ada", x)):
        database._cache = database._checked = None
        with pytest.raises(EnrolmentError, match="damaged: the model of 'ada'"):
            call(probe)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(8), "zero, NaN or infinite"),
        (np.full(8, np.nan), "zero, NaN or infinite"),
        (np.full(8, np.inf), "zero, NaN or infinite"),
        (np.ones(7), "do not fit a database of 8 dimensions"),
        (np.ones((2, 2, 8)), "do not fit a database of 8 dimensions"),
        (np.ones((0, 8)), "No recording to enrol"),
    ],
)
def test_bad_embeddings(tmp_path, value, message):
    database = _open(tmp_path)
    with pytest.raises(EnrolmentError, match=message):
        database.enrol("ada", value)
    assert not (tmp_path / "who.db").exists()


@pytest.mark.parametrize("name", ["", " ada", "a\nb", "a\x00b"])
def test_bad_names(tmp_path, name):
    with pytest.raises(EnrolmentError, match="is not a name for a speaker"):
        _open(tmp_path).enrol(name, np.eye(8)[0])


def test_strange_but_printable_names(tmp_path):
    database = _open(tmp_path)
    for name in ("'; DROP TABLE speakers; --", "王芳", "a/b c"):
        database.enrol(name, np.eye(8)[0])
        assert database.score(name, np.eye(8)[0]) == 1.0
    assert len(database.speakers()) == 3


def test_nobody_there(tmp_path):
    database = _open(tmp_path)
    assert database.speakers() == {}
    assert not (tmp_path / "who.db").exists()
    with pytest.raises(EnrolmentError, match="Nobody is enrolled"):
        database.identify(np.ones(8))
    with pytest.raises(EnrolmentError, match="Nobody called 'ada'"):
        database.remove("ada")
    with pytest.raises(EnrolmentError, match="Recordings do not fit"):
        database.enrol("ada", np.eye(8)[:3], agreement=0.5)
    assert not (tmp_path / "who.db").exists()
    database.enrol("ada", np.eye(8)[0])
    for call in (database.remove, lambda n: database.score(n, np.ones(8))):
        with pytest.raises(EnrolmentError, match="Nobody called 'bob'"):
            call("bob")
    with pytest.raises(EnrolmentError, match="top is 0"):
        database.identify(np.ones(8), top=0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(EnrolmentError, match="nowhere' is not a folder"):
        _open(tmp_path / "nowhere").enrol("ada", np.eye(8)[0])


def _stranger(folder, *statements):
    """A database as somebody else may hand it over, opened and searched."""
    _open(folder).enrol_many({"ada": np.eye(8)[0], "bob": np.eye(8)[1]})
    raw = sqlite3.connect(folder / "who.db")
    for statement, *values in statements:
        raw.execute(statement, values)
    raw.commit()
    raw.close()
    return _open(folder)


def _row(name, recordings, vector):
    """Add a row with the checksum that belongs to it."""
    total = (
        vector if isinstance(vector, bytes) else vector.astype("<f4").tobytes()
    )
    sums = checksum(str(name), str(recordings), total)
    return (
        "INSERT INTO speakers VALUES (?, ?, ?, ?)",
        name,
        recordings,
        total,
        sums,
    )


ENDLESS = (
    "CREATE VIEW {} AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 "
    "FROM r) SELECT n AS name, 1 AS recordings, 0 AS total, 0 AS checksum "
    "FROM r"
)
LARGE = (
    "CREATE VIEW speakers AS SELECT 'ada' AS name, 1 AS recordings, "
    "zeroblob(900000000) AS total, '' AS checksum"
)


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE speakers", ENDLESS.format("speakers")],
        ["DROP TABLE speakers", LARGE],
        [ENDLESS.format("more")],
        [
            "CREATE TRIGGER more AFTER INSERT ON speakers BEGIN UPDATE "
            "speakers SET name = 'eve' WHERE name = 'bob'; END"
        ],
        ["CREATE INDEX more ON speakers (recordings)"],
        ["CREATE VIRTUAL TABLE more USING fts5(x)"],
        [
            "DROP TABLE speakers",
            "CREATE TABLE speakers (name, recordings, total DEFAULT "
            "(zeroblob(900000000)), checksum)",
        ],
        ["ALTER TABLE record ADD COLUMN more AS (zeroblob(900000000))"],
        ["DROP TRIGGER after_update"],
        ["CREATE TABLE more (x)"],
    ],
)
def test_another_schema_is_refused_before_it_is_used(tmp_path, statements):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EnrolmentError, match="who.db' is damaged: it holds o"):
        _stranger(tmp_path, *([each] for each in statements))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 2**10 < 100  # MB


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_row("eve", 1, np.eye(8)[2].astype("<f4").tobytes()[:28]), "'eve' is"),
        (_row("eve", 1, np.ones(16)), "the model of 'eve' is not what"),
        (_row("eve", 1, np.full(8, np.nan)), "'eve' is not the sum of 1 unit"),
        (_row("eve", 1, np.full(8, np.inf)), "'eve' is not the sum of 1 unit"),
        (_row("eve", 1, np.ones(8)), "'eve' is not the sum of 1 unit"),
        (_row("eve", 1, np.zeros(8)), "'eve' is not the sum of 1 unit"),
        (_row("eve", 0, np.eye(8)[2]), "the model of 'eve' is not what"),
        (_row("eve", -1, np.eye(8)[2]), "the model of 'eve' is not what"),
        (_row("eve", 1.5, np.eye(8)[2]), "the model of 'eve' is not what"),
        (_row("eve", "many", np.eye(8)[2]), "the model of 'eve' is not what"),
        (_row(b"eve", 1, np.eye(8)[2]), "b'eve' is not a name"),
        (_row(None, 1, np.eye(8)[2]), "None is not a name"),
        (_row("\x1b[2J", 1, np.eye(8)[2]), r"'\\x1b.2J' is not a name"),
        (_row("e" * 2000, 1, np.eye(8)[2]), "eee' is not a name"),
        (_row("e" * 2**20, 1, np.eye(8)[2]), "too big"),
        (
            ["INSERT INTO speakers VALUES (CAST(x'ff' AS TEXT), 1, x'00', '')"],
            r"'\\udcff' is not a name",
        ),
        (["INSERT INTO record SELECT * FROM record"], "record of the enc"),
        (["UPDATE record SET state = 'old'"], "record of the encoder is an"),
        (["UPDATE record SET seal = ?", "[" * 60_000], "cannot be used"),
        (["UPDATE record SET seal = ?", "[" * 10**6], "too big"),
    ],
)
def test_rows_that_were_not_written_so_are_refused(tmp_path, row, message):
    """Checksums are no secret: they fit, and the row is refused anyway."""
    with pytest.raises(EnrolmentError, match=message) as caught:
        _stranger(tmp_path, row)
    assert "who.db'" in str(caught.value)


def test_an_index_that_leads_to_another_row_is_refused(tmp_path):
    _open(tmp_path).enrol_many({"ada": np.eye(8)[0], "bob": np.eye(8)[1]})
    path = tmp_path / "who.db"
    whole = path.read_bytes()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA writable_schema = ON")
    raw.execute(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM "
        "sqlite_master WHERE name = 'record') WHERE name = 'speakers'"
    )
    raw.commit()
    raw.close()
    with pytest.raises(EnrolmentError, match="who.db' is "):
        _open(tmp_path)
    at = whole.rindex(b"ada")  # of the index, which stands behind the table
    for place in (whole.index(b"ada"), at):
        path.write_bytes(whole[:place] + b"eda" + whole[place + 3 :])
        with pytest.raises(EnrolmentError, match="who.db' is damaged"):
            _open(tmp_path)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "who.db"
    path.mkdir()
    for _ in range(3):
        with pytest.raises(EnrolmentError, match="who.db' is not an enrolment"):
            _open(tmp_path).identify(np.ones(8))
        path.rmdir() if path.is_dir() else path.unlink()
        if not (tmp_path / "once").exists():
            path.symlink_to(path)  # to itself
            (tmp_path / "once").touch()
        else:
            os.mkfifo(path)


def test_a_log_of_another_file_changes_no_answer(tmp_path):
    (tmp_path / "other").mkdir()
    _open(tmp_path).enrol("ada", np.eye(8)[0])
    other = EnrolmentDatabase(tmp_path / "other" / "who.db", "f00d", 8)
    other.enrol_many({f"s{i}": np.eye(8)[i % 8] for i in range(200)})
    raw = sqlite3.connect(other.path)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("DELETE FROM speakers WHERE name < 's150'")
    raw.commit()
    wal = other.path.with_name("who.db-wal").read_bytes()
    raw.close()
    assert len(wal) > 10_000
    (tmp_path / "who.db-wal").write_bytes(wal)
    with pytest.raises(EnrolmentError, match="who.db-wal' beside it belongs"):
        _open(tmp_path).identify(np.ones(8))


def test_a_cut_file_is_refused(tmp_path):
    names = [f"s{i}" for i in range(300)]
    _open(tmp_path).enrol_many({n: np.eye(8)[0] for n in names})
    whole = (tmp_path / "who.db").read_bytes()
    for length in (1, 50, 100, 5000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "who.db").write_bytes(whole[:length])
        with pytest.raises(EnrolmentError, match="who.db' is"):
            _open(tmp_path)
        assert (tmp_path / "who.db").read_bytes() == whole[:length]


def test_embeddings_that_cancel_each_other_are_not_enrolled(tmp_path):
    database = _open(tmp_path)
    database.enrol("bob", np.eye(8)[1])
    vector = _random(8)
    for second in (-vector, -vector * 1.7, -vector + 1e-4):
        with pytest.raises(EnrolmentError, match="'ada' cannot be .* cancel"):
            database.enrol_many(
                {"cy": vector, "ada": np.stack([vector, second])}
            )
    with pytest.raises(EnrolmentError, match="'bob' cannot be enrolled"):
        database.enrol("bob", -np.eye(8)[1])
    with pytest.raises(EnrolmentError, match="Of 'eve', 1 of 2 embeddings are"):
        database.enrol("eve", np.stack([vector, vector * np.nan]))
    assert _open(tmp_path).speakers() == {"bob": 1}


def test_a_name_of_sqlite_is_a_file_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EnrolmentDatabase(":memory:", "f00d", 8).enrol("ada", np.eye(8)[0])
    assert EnrolmentDatabase(":memory:", "f00d", 8).speakers() == {"ada": 1}


def test_own_writes_are_not_checked_again(tmp_path, monkeypatch):
    """Else a thousand enrolments would each read a thousand rows."""
    database, calls = _open(tmp_path), []
    database.enrol("ada", np.eye(8)[0])
    check = database._check_rows
    monkeypatch.setattr(
        database, "_check_rows", lambda each: calls.append(check(each))
    )
    for i in range(5):
        database.enrol(f"s{i}", np.eye(8)[i])
    database.remove("ada")
    assert not calls
    assert database.identify(np.eye(8)[2])[0].name == "s2"
    _open(tmp_path).enrol("eve", np.eye(8)[6])
    assert database.identify(np.eye(8)[6])[0].name == "eve"
    assert len(calls) == 2


def test_a_file_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    models = {f"s{i}": np.eye(8)[i % 8] for i in range(3000)}
    _open(tmp_path).enrol_many(models)
    monkeypatch.setattr(enrolment, "_SECONDS", -100)
    with pytest.raises(EnrolmentError, match="who.db' .* now: interrupted"):
        _open(tmp_path)
