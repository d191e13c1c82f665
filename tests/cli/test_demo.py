"""Tests of the web page: its answers, and itself in a real browser."""

import http.client
import io
import itertools
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from small_encoder import export_small, voice

from speechbrain_ram.cli import demo
from speechbrain_ram.cli.main import main
from speechbrain_ram.inference import SpeakerEncoder

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("multipart")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "encoder"
    corpus = "voices <script>alert(1)</script>"
    facts = {"corpus": corpus, "speakers": 125}
    return SpeakerEncoder.from_folder(export_small(folder, facts=facts))


@pytest.fixture(scope="module")
def address(encoder):
    config = uvicorn.Config(
        demo.create_app(encoder), port=0, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_one_line(encoder, host, monkeypatch):
    """And nothing says before that the page is there."""
    monkeypatch.setattr(SpeakerEncoder, "from_folder", lambda *_, **__: encoder)
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        options = ["-e", "encoder", "--host", host, "--port", str(port)]
        result = CliRunner().invoke(main, ["demo", *options])
    assert result.exit_code == 2
    why = f"Error: The page cannot be served at {host}, port {port}: Address "
    why += "already in use. Give another --port"
    assert result.output.startswith(why) and result.output.count("\n") == 1
    result = CliRunner().invoke(main, ["demo", "-e", "e", "--port", "65536"])
    assert result.exit_code == 2 and "0<=x<=65535" in result.output
    with pytest.raises(ValueError, match="at no.such.host.invalid, port 80:"):
        demo.serve(encoder, "no.such.host.invalid", 80)


def test_the_address_is_told_when_the_page_is_there(encoder, monkeypatch):
    def run(server, sockets):
        port = sockets[0].getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        told.append("served")
        raise KeyboardInterrupt

    told = []
    monkeypatch.setattr(uvicorn.Server, "run", run)
    address = demo.serve(encoder, "127.0.0.1", 0, told.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", address)
    assert told == [address, "served"]


def wav_bytes(wav):
    body = io.BytesIO()
    soundfile.write(body, wav, 16000, format="WAV", subtype="FLOAT")
    return body.getvalue()


def post(address, **parts):
    """A form of files; returns status and answer."""
    edge = b"----edge"
    body = b""
    for name, (filename, content) in parts.items():
        head = f'form-data; name="{name}"; filename="{filename}"'
        body += b"--" + edge + b"\r\nContent-Disposition: "
        body += head.encode() + b"\r\n\r\n" + content + b"\r\n"
    body += b"--" + edge + b"--\r\n"
    kind = f"multipart/form-data; boundary={edge.decode()}"
    request = urllib.request.Request(
        f"{address}/compare", body, {"Content-Type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_answer_is_the_encoders(address, encoder):
    a, b = voice(1.0, 110), voice(2.0, 210)
    status, answer = post(
        address, a=("a.wav", wav_bytes(a)), b=("b.wav", wav_bytes(b))
    )
    assert status == 200
    assert answer["score"] == pytest.approx(encoder.score(a, b), abs=1e-3)
    assert answer["threshold"] == encoder.decision.threshold()
    assert "of different-speaker pairs score higher" in answer["told"][1]
    seconds = [wave["seconds"] for wave in answer["waveforms"]]
    assert seconds == [1.0, 2.0]
    for wave, wav in zip(answer["waveforms"], (a, b), strict=True):
        assert len(wave["peaks"]) == demo.BARS
        assert max(wave["peaks"]) == pytest.approx(np.abs(wav).max(), abs=1e-3)


def test_what_the_page_shows_of_the_encoder(address, encoder):
    with urllib.request.urlopen(f"{address}/encoder") as response:
        answer = json.load(response)
    assert tuple(answer["decision"]["targets"]) == encoder.decision.targets
    assert answer["eer"] == f"{encoder.decision.eer:.2f} %"
    with urllib.request.urlopen(address) as response:
        page = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")
    assert "http://" not in page and "https://" not in page


def test_unusable_recordings_are_named_as_they_were_sent(address):
    good = ("good.wav", wav_bytes(voice(1.0)))
    for name, content, message in (
        ("notes.txt", b"no audio", "'notes.txt' cannot be read"),
        ("mute.wav", wav_bytes(np.zeros(16000)), "'mute.wav' holds only sil"),
        ("blip.wav", wav_bytes(voice(0.01)), "'blip.wav' lasts 10 ms"),
    ):
        status, answer = post(address, a=good, b=(name, content))
        assert status == 400
        assert message in answer["error"]
        assert "/tmp" not in answer["error"]
    status, answer = post(address, a=good)
    assert status == 400
    assert answer["error"] == "Two files, a and b, are needed."


def test_too_much_is_refused(address, monkeypatch):
    monkeypatch.setattr(demo, "LARGEST_UPLOAD", 2**20)
    big = ("big.wav", bytes(2**20))
    status, answer = post(address, a=big, b=big)
    assert status == 413
    assert answer["error"] == "The recordings exceed 1 MB together."


def send(address, head, *parts, pause=0.0):
    """A request byte by byte; returns status and answer."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n")
        for part in parts:
            time.sleep(pause)
            line.sendall(part)
        response = http.client.HTTPResponse(line)
        response.begin()
        return response.status, json.loads(response.read())


FORM = "Content-Type: multipart/form-data; boundary=x\n"


def test_what_is_sent_in_chunks_is_counted(address, monkeypatch):
    monkeypatch.setattr(demo, "LARGEST_UPLOAD", 2**20)
    head = f"POST /compare HTTP/1.1\nHost: localhost\n{FORM}"
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    begin = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"'
    begin += b"\r\n\r\n"
    first = f"{len(begin):x}\r\n".encode() + begin + b"\r\n"
    status, answer = send(
        address,
        head + "Transfer-Encoding: chunked\n",
        *(first, *[chunk] * 40, b"0\r\n\r\n"),
    )
    assert status == 413
    assert answer["error"] == "The recordings exceed 1 MB together."


def test_who_sends_slowly_is_not_waited_for(address, monkeypatch):
    monkeypatch.setattr(demo, "UPLOAD_SECONDS", 0.5)
    head = f"POST /compare HTTP/1.1\nHost: localhost\n{FORM}"
    status, answer = send(address, head + "Content-Length: 99\n", b"--x")
    assert status == 408
    assert answer["error"] == "The recordings did not arrive within 0.5 s."


@pytest.mark.parametrize(
    "request_line, headers, status, says",
    [
        ("GET /nothing", "", 404, "Not Found"),
        ("GET /compare", "", 405, "Method Not Allowed"),
        ("POST /compare", "", 411, "Two files, a and b, are needed."),
        ("POST /compare", "Content-Length: 0\n", 400, "Two files"),
        ("POST /compare", f"{FORM}Content-Length: 0\n", 400, "Two files"),
        ("GET /", "Origin: http://else.where\n", 403, "'http://else.where'"),
        ("GET /", "Origin: null\n", 403, "'null'"),
    ],
)
def test_every_error_is_said(address, request_line, headers, status, says):
    head = f"{request_line} HTTP/1.1\nHost: localhost\n{headers}"
    found, answer = send(address, head)
    assert found == status
    assert says in answer["error"]


@pytest.mark.parametrize("length", ["-1", "many", "1_0", "\u0661"])
def test_a_length_that_is_no_number(encoder, length):
    """Servers refuse it already; another one may not."""
    client = pytest.importorskip("starlette.testclient")
    page = client.TestClient(demo.create_app(encoder), "http://localhost")
    headers = {"Content-Length": length.encode(), "Content-Type": "a/b"}
    answer = page.post("/compare", content=b"", headers=headers)
    assert answer.status_code == 400
    assert "Content-Length is" in answer.json()["error"]


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_name_of_somebody_else_is_refused(address, host, status):
    found, answer = send(address, f"GET /encoder HTTP/1.1\nHost: {host}\n")
    assert found == status
    if status == 403:
        assert f"not served as '{host}'" in answer["error"]


def test_a_name_that_was_asked_for_is_served():
    assert "ram.example" in demo.own_names("RAM.example")
    names = demo.own_names("ram.example")
    assert demo.why_foreign({"host": "RAM.example:80"}, names) is None
    headers = {"host": "localhost:80", "origin": "http://localhost:80"}
    assert demo.why_foreign(headers, names) is None
    headers["origin"] = "http://localhost:81"
    assert "'http://localhost:81'" in demo.why_foreign(headers, names)


@pytest.mark.parametrize(
    "seconds, rate, channels", [(3600, 16000, 1), (250, 192_000, 2)]
)
def test_what_is_small_and_long_is_refused(address, seconds, rate, channels):
    """FLAC holds an hour of silence in some kilobytes."""
    body = io.BytesIO()
    with soundfile.SoundFile(
        body, "w", rate, channels, "PCM_16", format="FLAC"
    ) as file:
        for _ in range(seconds):
            file.write(np.zeros((rate, channels), np.int16))
    good = ("good.wav", wav_bytes(voice(1.0)))
    began = time.monotonic()
    status, answer = post(address, a=good, b=("b.flac", body.getvalue()))
    assert time.monotonic() - began < 5
    assert status == 400
    assert answer["error"].startswith(f"'b.flac' lasts {seconds:,} s")
    assert "up to 300 s and 28,800,000 samples" in answer["error"]


def test_work_ends_when_the_visitor_leaves(address, encoder, monkeypatch):
    """Nobody waits for an answer to one who is gone; nothing is printed."""
    begun, stages = threading.Event(), []

    def slow(*_):
        stages.append("envelope")
        begun.set()
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(demo, "envelope", slow)
    monkeypatch.setattr(
        SpeakerEncoder, "compare", lambda *_: stages.append("compare")
    )
    body = b""
    for side in "ab":
        body += (
            f'--x\r\nContent-Disposition: form-data; name="{side}"; '.encode()
        )
        body += b'filename="f"\r\n\r\n1\r\n'
    body += b"--x--\r\n"
    head = f"POST /compare HTTP/1.1\nHost: localhost\n{FORM}"
    head += f"Content-Length: {len(body)}\n"
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        assert begun.wait(10)
    time.sleep(1.5)
    assert stages == ["envelope"]


def test_who_leaves_while_sending_prints_nothing(address, caplog):
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /compare HTTP/1.1\nHost: localhost\n{FORM}"
    head += "Content-Length: 100000\n"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n--x")
    time.sleep(0.5)
    assert "Traceback" not in caplog.text and not caplog.records


def test_an_encoder_without_thresholds(tmp_path):
    folder = export_small(tmp_path / "encoder", decision=False)
    with pytest.raises(ValueError, match="No threshold was saved"):
        demo.create_app(SpeakerEncoder.from_folder(folder))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.1)


def test_the_page_in_a_browser(address, encoder, browser, tmp_path):
    def text(element):
        return browser.find_element("id", element).text

    browser.get(address)
    wait_for(lambda: "EER" in text("facts"))
    assert "alert(1)" in text("facts")  # as text, not as a script
    compare = browser.find_element("id", "compare")
    assert not compare.is_enabled()
    for side, pitch in (("a", 110), ("b", 210)):
        path = tmp_path / f"{side}.wav"
        path.write_bytes(wav_bytes(voice(1.0, pitch)))
        browser.find_element("id", f"file-{side}").send_keys(str(path))
    compare.click()
    wait_for(lambda: text("verdict"))
    assert text("verdict") in ("The same speaker", "Different speakers")
    asked = [tmp_path / f"{side}.wav" for side in "ab"]
    said = ". ".join(encoder.compare(*asked).told())  # as the command says it
    assert text("details") == said[0].upper() + said[1:]
    assert text("facts").startswith(
        f"Development list imagined: EER {encoder.decision.eer:.2f} % over 400"
    )
    threshold = re.search(r"threshold (\d\.\d{3})", text("details"))[0]
    plot = browser.find_element("id", "plot").text
    assert "score" in plot and threshold in plot and "2 %" in plot, plot
    assert "trained on 125 speakers. That is few" in text("doubt")
    ask = "return doubt({corpus: arguments[0], speakers: arguments[1]})"
    assert "synthetic" in browser.execute_script(ask, "synthetic voices", 9999)
    assert browser.execute_script(ask, "VoxCeleb2", 5994) == ""
    gap = (  # between the score's line and the threshold's label
        "drawScores(arguments[0], .4);"
        "const label = document.querySelector('#plot .key').getBBox();"
        "const x = [...document.querySelectorAll('#plot line')].at(-1)"
        ".x1.baseVal.value;"
        "return Math.max(label.x - x, x - label.x - label.width)"
    )
    for score in (-0.5, 0.39, 0.41, 0.5, 0.6, 0.9):
        assert browser.execute_script(gap, score) > 0, score
    texts = (  # of the plot: left, right, top, bottom on the screen
        "drawScores(arguments[0], .4);"
        "const all = document.querySelectorAll('#plot, #plot text');"
        "return [...all].map(each => {"
        "const box = each.getBoundingClientRect();"
        "return [box.left, box.right, box.top, box.bottom]})"
    )
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 1}
    screen = "Emulation.setDeviceMetricsOverride"
    browser.execute_cdp_cmd(screen, {**metrics, "mobile": True})
    for score in (-0.9, 0.3, 0.39, 0.41, 0.9):  # on a telephone
        plot, *boxes = browser.execute_script(texts, score)
        assert plot[0] >= 0 and plot[1] <= 375
        for box in boxes:
            assert box[0] >= plot[0] and box[1] <= plot[1], (score, box)
            assert box[3] - box[2] > 12, (score, box)
        for a, b in itertools.combinations(boxes, 2):
            apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
            assert apart, (score, a, b)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    drawn = (
        "const c = document.getElementById('wave-a');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height)"
        ".data.some(value => value > 0)"
    )
    assert browser.execute_script(drawn)

    # The browser's fake microphone beeps.
    button = browser.find_element("id", "record-a")
    button.click()
    wait_for(lambda: button.text == "Stop")
    time.sleep(2.5)
    button.click()
    name = "#side-a .name"
    wait_for(
        lambda: (
            "microphone A" in browser.find_element("css selector", name).text
        )
    )
    compare.click()
    wait_for(lambda: text("verdict") or text("error"))
    assert text("verdict"), text("error")

    path = tmp_path / "notes.txt"
    path.write_bytes(b"no audio")
    browser.find_element("id", "file-b").send_keys(str(path))
    compare.click()
    wait_for(lambda: "'notes.txt' cannot be read" in text("error"))
    assert not text("verdict")
    player = browser.find_element("css selector", "#side-b audio")
    wait_for(lambda: not player.is_displayed())
    good = str(tmp_path / "a.wav")
    browser.find_element("id", "file-b").send_keys(good)
    wait_for(player.is_displayed)
    assert not text("error")
    severe = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "400 (Bad Request)" not in str(entry)
    ]
    assert severe == []
