"""Chromium without a window, driven by its DevTools protocol through a pipe."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page.

    Attributes:
        urls: what the page has requested from a host, also in vain.
        errors: uncaught errors of its scripts.
    """

    def __init__(self, width=1280, height=900):
        self.urls, self.errors = [], []
        self._numbers, self._buffer = itertools.count(1), b""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium_")
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        words = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", "--no-sandbox"]
        words += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
        # No name but that of this machine is resolved, and what Chromium itself fetches is off.
        words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        words += ["--disable-background-networking", "--disable-component-update"]
        words += [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the protocol is on 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(theirs_in), str(theirs_out), *words],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        with contextlib.suppress(OSError):  # files that Chromium's helpers still write
            self._profile.cleanup()

    def call(self, method, **parameters):
        """The result of a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _next(self, seconds=60):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], seconds)[0], "Chromium does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            self.urls += [] if url.startswith(("data:", "blob:", "about:")) else [url]
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        return message

    def resize(self, width, height):
        """Set the size of the page in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def go(self, url):
        """Open a page."""
        self.call("Page.navigate", url=url)

    def js(self, expression):
        """The value of an expression, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression, seconds=60):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.1)
        return value

    def upload(self, selector, *paths):
        """Choose files in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def move(self, x, y):
        """Move the mouse to a place on the page."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def downloads_to(self, folder):
        """Save downloads in a folder, under their names once they are complete."""
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def picture(self):
        """A PNG of the page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
