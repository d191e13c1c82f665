"""Text and names as people hand them in."""

import pytest

from speechbrain_ram.data.names import (
    TextError,
    alike,
    check_text,
    part_name,
    part_of,
    read_text,
    session_of,
)


@pytest.mark.parametrize(
    "content, what",
    [
        ("a\nZoë".encode("latin-1"), "line 2: .*byte 0xeb.*Save it as UTF-8"),
        ("\ufeffa\n\n\udcff".encode(errors="surrogatepass"), "line 3: .* 0xed"),
        (b"a\nb\0", "line 2: not text in UTF-8 .a NUL byte"),
        ("a".encode("utf-16"), "line 1: .*byte 0xff.*UTF-16"),
    ],
)
def test_what_is_no_text(tmp_path, content, what):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    for read in (read_text, check_text):
        with pytest.raises(TextError, match=f"list.txt', {what}"):
            read(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffZoë\n".encode())
    check_text(path)
    assert read_text(path) == "Zoë\n"


def test_names_that_nobody_can_tell_apart():
    assert alike(["Zoe\u0308", "Zo\u00eb"]) == ("Zoe\u0308", "Zo\u00eb")
    assert alike(["a", "b", "a\xa0"]) == ("a", "a\xa0")
    assert alike(["a", "A", "a"]) is None


def test_parts_and_their_sessions(tmp_path):
    name = part_name("may/radio.wav", 16000, 48000)
    assert name == "may/radio.wav@16000-48000"
    assert part_of(name) == ("may/radio.wav", 16000, 48000)
    assert session_of(name) == "may/radio.wav"
    assert session_of("may/radio.wav") == "may"
    (tmp_path / "a@1-2").touch()  # a recording that is called so
    for whole in (str(tmp_path / "a@1-2"), "a@1", "a@1-x", "a@1-٣", "a@-1-2"):
        assert part_of(whole) == (whole, 0, None)
