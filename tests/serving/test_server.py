"""`mit-semseg serve`: requests, limits and the end of a server."""

import http.client
import importlib.util
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

NEEDED = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)

from http_server import CLASSES, Brightness, ask, form, png, serving, wait_until  # noqa: E402
from PIL import Image  # noqa: E402
from processes import Command  # noqa: E402

from mit_semseg import Segmenter, shipped  # noqa: E402
from mit_semseg.cli import main  # noqa: E402


@pytest.fixture
def model():
    return Brightness()


@pytest.fixture
def port(model):
    with serving(model, window=0) as number:
        yield number


# ------------------------------------------------------------------------------ answers
def test_labels_are_a_palette_png(port):
    answer = ask(port, "/predict", png(value=255))
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert answer.image.mode == "P"
    assert np.asarray(answer.image).tolist() == 4 * [6 * [1]]
    assert np.asarray(answer.image.convert("RGB"))[0, 0].tolist() == CLASSES.colors[1].tolist()


def test_an_overlay_is_a_png(port):
    answer = ask(port, "/predict?output=overlay", png(value=0))
    assert answer.image.mode == "RGB"
    assert np.asarray(answer.image)[0, 0] == pytest.approx(CLASSES.colors[0] / 2, abs=1)


def test_areas_are_json(port):
    answer = ask(port, "/predict?output=areas", png(value=255))
    assert answer.headers["content-type"] == "application/json"
    bright = {"id": 1, "name": "bright", "pixels": 24, "area": 1.0}
    assert (answer.json["width"], answer.json["height"]) == (6, 4)
    assert [bright | one for one in answer.json["classes"]] == answer.json["classes"]


def test_polygons_are_geojson_in_pixels(port):
    answer = ask(port, "/predict?output=polygons", png(value=255))
    assert answer.headers["content-type"] == "application/geo+json"
    (region,) = answer.json["features"]
    assert region["properties"]["class"] == "bright"
    (ring,) = region["geometry"]["coordinates"]
    assert {*map(tuple, ring)} == {(0, 0), (6, 0), (6, 4), (0, 4)}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json", "application/json"),
        ("image/png", "image/png"),
        ("text/html, application/json;q=0.9, */*", "application/json"),
        ("application/geo+json", "application/geo+json"),
        ("*/*", "image/png"),
    ],
)
def test_the_accept_header_chooses(port, accept, kind):
    assert ask(port, "/predict", png(), {"Accept": accept}).headers["content-type"] == kind


def test_an_unknown_output_is_refused(port):
    answer = ask(port, "/predict?output=video", png())
    assert answer.status == 422
    assert "'labels'" in answer.body.decode()


def test_an_image_may_be_the_file_of_a_form(port):
    body, headers = form(png(value=255), filename="../../etc/passwd")
    answer = ask(port, "/predict?output=areas", body, headers)
    assert [one["name"] for one in answer.json["classes"]] == ["bright"]


@pytest.mark.parametrize(
    ("body", "boundary"),
    [(b"--xyz--\r\n", "xyz"), (b"nonsense", "xyz"), (b"", ""), (form(b"")[0], "other")],
)
def test_a_form_without_a_file_is_refused(port, body, boundary):
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert ask(port, "/predict", body, headers).status == 400


@pytest.mark.parametrize("body", [b"http://127.0.0.1/a.jpg", b"/etc/passwd", b"", b"GIF89a"])
def test_urls_paths_and_other_text_are_no_images(port, body):
    answer = ask(port, "/predict", body)
    assert answer.status == 415
    assert "not a readable image" in answer.json["detail"]


def test_a_damaged_image_is_refused(port):
    assert ask(port, "/predict", png(64, 64)[:-20]).status == 400


def test_classes_and_health(port):
    assert ask(port, "/classes").json == [
        {"id": k, "name": name, "color": CLASSES.colors[k].tolist()}
        for k, name in enumerate(CLASSES.names)
    ]
    health = ask(port, "/health").json
    assert health == {"status": "ok", "model": "a_model", "device": "cpu", "waiting": 0}


def test_the_documentation_needs_no_network(port):
    schema = ask(port, "/openapi.json").json
    assert {"/predict", "/health", "/classes", "/metrics"} == {*schema["paths"]}
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "image/jpeg"} < {*body}
    page = ask(port, "/docs").body.decode()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//[^"']+""", page)
    for path in re.findall(r"""(?:src|href)=["'](/[^"']+)""", page):
        assert ask(port, path).status == 200


def figure(port, name):
    found = re.search(
        rf"^mit_semseg_{re.escape(name)} (\S+)$", ask(port, "/metrics").body.decode(), re.M
    )
    return float(found[1]) if found else 0.0


def test_metrics_count_requests(port):
    for body in (png(), png(), b"none"):
        ask(port, "/predict", body)
    assert figure(port, 'requests_total{status="200"}') == 2
    assert figure(port, 'requests_total{status="415"}') == 1
    assert figure(port, "batch_images_count") == 2
    assert figure(port, "request_seconds_count") == 2
    assert figure(port, "admitted") == 0


# ------------------------------------------------------------------------------ limits
def test_too_many_bytes_are_refused_before_they_are_sent(model):
    with (
        serving(model, megabytes=0.001) as port,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_too_many_bytes_without_a_length_are_refused(model):
    """As in a chunked body, whose end nobody knows."""

    def endless():
        while True:
            yield bytes(1000)

    with serving(model, megabytes=0.01) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with closing(connection), pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.request("POST", "/predict", endless(), encode_chunked=True)
        assert figure(port, 'requests_total{status="413"}') == 1


def test_too_many_pixels_are_refused(model):
    with serving(model, megapixels=0.001) as port:
        answer = ask(port, "/predict", png(100, 100))
        assert answer.status == 413
        assert answer.json["detail"] == "an image of 100 x 100 pixels; the limit is 1000"
    assert not model.batches


def test_more_than_the_queue_are_told_to_come_later(model):
    with serving(model, queue=3, window=0) as port, ThreadPoolExecutor(3) as pool:
        model.go.clear()
        first = [pool.submit(ask, port, "/predict", png()) for _ in range(3)]
        wait_until(lambda: figure(port, "admitted") == 3)
        answer = ask(port, "/predict", png())
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert ask(port, "/health").status == 200
        model.go.set()
        assert [one.result().status for one in first] == 3 * [200]
        assert ask(port, "/predict", png()).status == 200


def test_what_takes_too_long_is_given_up(model):
    with serving(model, timeout=0.5, window=0) as port, ThreadPoolExecutor(2) as pool:
        model.go.clear()
        running = pool.submit(ask, port, "/predict", png())
        assert model.entered.wait(10)
        waiting = pool.submit(ask, port, "/predict", png())
        assert (running.result().status, waiting.result().status) == (504, 504)
        model.go.set()
        wait_until(lambda: model.batches)
        assert ask(port, "/predict", png()).status == 200
    assert model.batches == [1, 1]  # not that which was given up while it waited


def test_a_slow_client_is_given_up(model):
    with (
        serving(model, timeout=0.5) as port,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_frees_its_place(model):
    with serving(model, queue=1) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            wait_until(lambda: figure(port, "admitted") == 1)
        wait_until(lambda: figure(port, "admitted") == 0)
        assert ask(port, "/predict", png()).status == 200


def test_simultaneous_requests_share_a_pass(model):
    with serving(model, window=0) as port, ThreadPoolExecutor(9) as pool:
        model.go.clear()
        first = pool.submit(ask, port, "/predict", png(1, 1))
        assert model.entered.wait(10)
        values = [0, 255] * 4
        asked = [pool.submit(ask, port, "/predict", png(value=value)) for value in values]
        wait_until(lambda: figure(port, "waiting") == 8)
        model.go.set()
        assert first.result().status == 200
        found = [int(np.asarray(one.result().image).max()) for one in asked]
    assert found == [0, 1] * 4
    assert model.batches == [1, 8]


def test_a_model_of_bands_is_refused(model, monkeypatch, capsys):
    model.predictor.options = SimpleNamespace(bands=("red",), depth=False)
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda *args, **more: model)
    assert main(["serve", "a_model", "--gpu", "cpu"]) == 2
    assert "error: a_model takes bands or depth; serve is for RGB" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def command(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    started = Command([sys.executable, "-m", "mit_semseg.cli", "serve", "--port", "0"], log)
    try:
        wait_until(lambda: "Serving" in started.text() or not started.is_running(), 120)
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def test_the_command_answers_as_the_segmenter_and_finishes_when_stopped(command, tmp_path):
    """A request that runs when SIGTERM comes is answered; then the command ends with status 0."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(photo := tmp_path / "photo.png")
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)", command.text())[1])
    wait_until(lambda: answers(port))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, port, "/predict", photo.read_bytes())
        wait_until(lambda: figure(port, "admitted") == 1)
        command.process.send_signal(signal.SIGTERM)
        answer = asked.result()
    expected = Segmenter.from_pretrained(shipped.MODEL, device="cpu")(photo)
    np.testing.assert_array_equal(np.asarray(answer.image), expected.labels)
    assert command.process.wait(30) == 0
    assert command.text().rstrip().endswith("Stopped")


def answers(port):
    try:
        return ask(port).status == 200
    except OSError:
        return False


def test_the_port_may_be_taken(capsys, monkeypatch):
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda *args, **more: Brightness())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--gpu", "cpu", "--port", str(port)]) == 2
    assert f"error: --host 127.0.0.1 --port {port}: " in capsys.readouterr().err


def test_without_the_libraries_the_extra_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        "error: serve needs uvicorn: pip install 'mit_semseg[serve]'\n"
    )
