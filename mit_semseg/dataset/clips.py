"""Videos: files, cameras and streams, read and written frame by frame with OpenCV."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mit_semseg.errors import counted
from mit_semseg.files import PathLike

log = logging.getLogger("mit_semseg")

SUFFIXES = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"])
_STREAMS = ("rtsp://", "rtsps://", "http://", "https://")
_FPS = 30.0  # of a camera that does not tell
# Fewer frames than this share of those that the header of a file claims are reported.
_COMPLETE = 0.98


def is_video(entry: PathLike) -> bool:
    """Whether this is a video by its name: its suffix, a number of a camera, or an RTSP stream."""
    text = os.fspath(entry)
    if text.isdecimal() or text.startswith(_STREAMS[:2]):
        return not os.path.exists(text)
    path = re.split("[?#]", text)[0] if text.startswith(_STREAMS) else text
    return Path(path).suffix.lower() in SUFFIXES


def split_videos(entries: Iterable[PathLike]) -> tuple[list[PathLike], list[str]]:
    """Entries that are images or folders, and videos, of which globs are replaced by files."""
    images: list[PathLike] = []
    videos: list[str] = []
    for entry in entries:
        text = os.fspath(entry)
        if not is_video(entry):
            images.append(entry)
        elif glob.has_magic(text) and not os.path.exists(text) and "://" not in text:
            videos += sorted(glob.glob(text, recursive=True)) or [text]
        else:
            videos.append(text)
    return images, list(dict.fromkeys(videos))


class Clip:
    """An open video. Iterating over it reads its frames, (H, W, 3) uint8 RGB each, once.

    Use it in a `with` statement, which closes it.

    Args:
        source: path of a file, number of a camera, or a url (rtsp, http, https).

    Attributes:
        name: the source, for messages.
        live: whether it is a camera or a stream of rtsp, which have no end.
        fps: frames per second, 30 if they are not known.
        count: number of frames by the header of the file, None if that is not known.
        size: (width, height) of the frames in pixels, by the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a video, or there is no such camera.
    """

    def __init__(self, source: PathLike | int) -> None:
        text = str(source) if isinstance(source, int) else os.fspath(source)
        camera = text.isdecimal() and not os.path.exists(text)
        self.name = f"camera {text}" if camera else text
        self.live = camera or text.startswith(_STREAMS[:2])
        if not camera and not text.startswith(_STREAMS) and not os.path.isfile(text):
            raise FileNotFoundError(f"{text}: no such file")
        self._capture = cv2.VideoCapture(int(text) if camera else text)
        if not self._capture.isOpened():
            fix = "is it connected, and used by no other program?" if camera else "not a video"
            raise ValueError(f"{self.name}: cannot be opened; {fix}")
        if self.live:
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not an old one
        fps, count = (self._capture.get(x) for x in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else _FPS
        known = not self.live and math.isfinite(count) and count > 0
        self.count = int(count) if known else None
        self.size = (
            int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        )

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        number = 0
        while True:
            there, frame = self._capture.read()
            if not there:
                break
            number += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number:
            raise ValueError(f"{self.name}: a video without frames")
        if self.count and number < _COMPLETE * self.count - 1:
            log.warning(
                "%s: ended after %s of %d; damaged or truncated",
                *(self.name, counted(number, "frame"), self.count),
            )


class ClipWriter:
    """Writes a video file (MPEG-4), which is complete when the `with` statement ends.

    Args:
        path: the file, .mp4, in an existing folder.
        fps: frames per second.
        live: keep the pace of a camera: a frame is repeated while the next one is not there.

    Attributes:
        frames: number of frames written.
    """

    def __init__(self, path: PathLike, fps: float, live: bool = False) -> None:
        self.path, self.fps, self.live = path, fps, live
        self.frames = 0
        self._file: Any = None
        self._start = 0.0

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.release()

    def write(self, picture: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 RGB; the encoder drops an odd last row or column.

        Raises:
            OSError: the file cannot be written.
            ValueError: the frame has another size than the first.
        """
        H, W = picture.shape[:2]
        if self._file is None:
            self._size, self._start = (H, W), time.monotonic()
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._file = cv2.VideoWriter(os.fspath(self.path), code, self.fps, (W, H))
            if not self._file.isOpened():
                raise OSError(f"{os.fspath(self.path)}: cannot be written as a video")
        if self._size != (H, W):
            raise ValueError(
                f"{os.fspath(self.path)}: a frame of {W}x{H} pixels after frames of "
                f"{self._size[1]}x{self._size[0]}; a video has one size"
            )
        due = round((time.monotonic() - self._start) * self.fps) if self.live else 0
        frame = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        for _ in range(max(1, due + 1 - self.frames)):
            self._file.write(frame)
            self.frames += 1
