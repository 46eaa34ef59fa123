"""Many clients at a time, each with one request after the other: `python tests/serving/load.py`.

Starts `mit-semseg serve` with the shipped model at one scale, and prints what the clients saw, and
the processor time of an image in the server and in a `Segmenter`. Other options are the server's.
"""

import argparse
import io
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from http_server import ask, wait_until  # noqa: E402
from processes import Command  # noqa: E402

from mit_semseg import Segmenter, shipped  # noqa: E402


def photo(width, height):
    """The bytes of a JPEG of smooth noise."""
    small = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def client(port, body, count, path):
    """(status, seconds) of each request; after a 503 the client waits as it is told."""
    seen = []
    for _ in range(count):
        began = time.perf_counter()
        answer = ask(port, path, body, timeout=600)
        seen.append((answer.status, time.perf_counter() - began))
        if answer.status == 503:
            time.sleep(float(answer.headers["retry-after"]))
    return seen


def model_at(short, folder):
    """A copy of the shipped model that computes images at this short side."""
    copy = Path(folder) / "model"
    shutil.copytree(shipped.model(shipped.MODEL), copy)
    file = copy / "config.yaml"
    text = re.sub(r"(TEST:.*?imgSizes:\n *- )\d+", rf"\g<1>{short}", file.read_text(), flags=re.S)
    file.write_text(text)
    return copy


def alone(model, body, count=10):
    """Processor seconds of an image without a server."""
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    segmenter(body)
    began = time.process_time()
    for _ in range(count):
        segmenter(body)
    return (time.process_time() - began) / count


def figure(text, name):
    """A figure of `/metrics`."""
    return float(re.search(rf"^{name} (\S+)", text, re.M)[1])


def load(port, clients, count, size, path="/predict?output=areas"):
    """Load a server, and return the figures by name."""
    body = photo(*size)
    for _ in range(3):
        assert ask(port, path, body, timeout=600).status == 200
    before, began = ask(port, "/metrics").body.decode(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, port, body, count, path) for _ in range(clients)]
        seen = [one for future in futures for one in future.result()]
    elapsed = time.perf_counter() - began
    times = [seconds for status, seconds in seen if status == 200]
    after = ask(port, "/metrics").body.decode()

    def risen(name):
        return figure(after, name) - figure(before, name)

    images = risen("mit_semseg_batch_images_sum")
    return {
        "statuses": dict(Counter(status for status, _ in seen)),
        "images_per_second": len(times) / elapsed,
        "p50": float(np.percentile(times, 50)),
        "p95": float(np.percentile(times, 95)),
        "images_per_pass": images / risen("mit_semseg_batch_images_count"),
        "cpu_seconds_per_image": risen("process_cpu_seconds_total") / images,
        "megabytes_before": figure(before, "process_resident_memory_bytes") / 1e6,
        "megabytes_after": figure(after, "process_resident_memory_bytes") / 1e6,
    }


def start(log, *options):
    """`mit-semseg serve` on a free port: the command and the port."""
    words = [sys.executable, "-m", "mit_semseg.cli", "serve", "--port", "0", *options]
    command = Command(words, log)
    wait_until(lambda: "Serving" in command.text() or not command.is_running(), 120)
    found = re.search(r"http://127\.0\.0\.1:(\d+)", command.text())
    assert found, command.text()
    port = int(found[1])

    def listens():
        try:
            return ask(port).status == 200
        except OSError:
            return False

    wait_until(listens)
    return command, port


def main():
    """Print the figures of one load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5, help="of each client")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 360], help="width and height")
    parser.add_argument("--short", type=int, default=180, help="side that the network sees")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        model = model_at(arguments.short, folder)
        command, port = start(Path(folder) / "log", model, *options)
        try:
            found = load(port, arguments.clients, arguments.requests, arguments.size)
            for name, value in found.items():
                print(f"{name:22} {value if isinstance(value, dict) else round(value, 3)}")
            seconds = alone(model, photo(*arguments.size))
            print(f"{'cpu_seconds_alone':22} {seconds:.3f}")
        finally:
            command.process.terminate()
            print(f"{'exit status':22} {command.process.wait(120)}")


if __name__ == "__main__":
    main()
