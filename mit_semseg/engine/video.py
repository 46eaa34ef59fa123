"""Prediction of videos, frame by frame in their order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mit_semseg import scores
from mit_semseg.config import Options, PredictOptions
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.clips import Clip, ClipWriter, split_videos
from mit_semseg.engine import predict as stills
from mit_semseg.engine.checkpoint import load_model, model_classes
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.inputs import output_stems, result_endings
from mit_semseg.engine.pipeline import OrderedCalls, in_threads
from mit_semseg.engine.predict_report import Result
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.signals import StopRequest
from mit_semseg.engine.transfer import HostCopy, on_device
from mit_semseg.errors import counted, one_line
from mit_semseg.files import PathLike
from mit_semseg.visualize.legend import legend, percent
from mit_semseg.visualize.results import class_counts, render

# Of `TEST.save`; others are not written for videos.
KINDS = ("color", "overlay", "side")


class Smoothing:
    """Exponential average of the probabilities of successive frames, against flicker.

    P(t) = weight * P(t - 1) + (1 - weight) * softmax(logits(t)), at the network's resolution, and
    P(0) = softmax(logits(0)). It starts again if the size of the frames changes.

    Args:
        weight: of the frames before, in [0, 1); 0: each frame by itself. The average reaches back
            about 1 / (1 - weight) frames.

    Raises:
        ValueError: the weight is out of range.
    """

    def __init__(self, weight: float) -> None:
        self.weight = PredictOptions(smooth=weight).smooth  # checks it
        self._mean: list[Tensor] = []

    def __call__(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Logits with the averaged probabilities.

        Args:
            logits: of frames in order, (N, K, h, w) for each scale.

        Returns:
            Of the same shapes, in at least float32; the logits themselves with a weight of 0.
        """
        if not self.weight:
            return list(logits)
        shapes = [x.shape[1:] for x in logits]
        if [x.shape for x in self._mean] != shapes:
            self._mean = []
        smooth = []
        for scale, x in enumerate(logits):
            p = x.to(torch.promote_types(x.dtype, torch.float32)).softmax(1)
            for n in range(len(p)):
                if n or self._mean:
                    before = p[n - 1] if n else self._mean[scale].to(p.device)
                    p[n].lerp_(before, self.weight)
            smooth.append(p)
        self._mean = [p[-1].clone() for p in smooth]
        # The logarithm of 0 could not be interpolated.
        return [p.clamp_(min=torch.finfo(p.dtype).tiny).log_() for p in smooth]


def predict_all(
    options: Options,
    entries: Iterable[PathLike],
    devices: Sequence[torch.device],
    *,
    rank: int = 0,
    world: int = 1,
) -> list[Result]:
    """Segment images, as `engine.predict.predict`, and then videos, on rank 0 and its first device.

    Args:
        options: the configuration.
        entries: images, folders, globs, urls and `-`, as `predict` takes, and videos.
        devices: where to compute.
        rank, world: as of `predict`.

    Returns:
        The results of `predict` and, on rank 0, of `predict_videos`.
    """
    images, videos = split_videos(entries)
    results = stills.predict(options, images, devices, rank=rank, world=world) if images else []
    if videos and rank == 0:
        results += predict_videos(options, videos, devices[0])
    return results


def predict_videos(
    options: Options,
    videos: Sequence[str],
    device: torch.device,
    *,
    checkpoint: str | None = None,
    result: PathLike | None = None,
    progress: bool = True,
) -> list[Result]:
    """Segment videos, print the class areas, and write videos of the predictions.

    Frames are computed in order, up to `TEST.batch_size` in a forward pass, and averaged as
    `TEST.smooth` says. A few frames are in memory at a time. A video that cannot be read or written
    is reported, and the next one begins. SIGINT and SIGTERM end the video after the current frame;
    the file is complete.

    Args:
        options: the configuration.
        videos: files, numbers of cameras, urls.
        device: where to compute.
        checkpoint: instead of `TEST.checkpoint`.
        result: folder of the results, instead of `TEST.result`.
        progress: show a progress bar with the frames per second.

    Returns:
        One dict per video: `image` (its name), `outputs` (kind -> path), `areas` (class name ->
        mean share), `size` (width, height), `frames`, `fps` (of the video) and `seconds` (per
        frame); or `image` and `error`.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a wrong configuration.
        KeyboardInterrupt: a signal has ended the prediction of a video that is no camera.
    """
    test, data = options.TEST, options.DATASET
    if data.bands or data.depth:
        raise ValueError("videos are RGB: they need a model without DATASET.bands and depth")
    checkpoint = checkpoint or test.checkpoint
    out = Path(test.result if result is None else result)
    run = _Run(
        options,
        device,
        model_classes(options, checkpoint),
        Predictor.of(load_model(options, checkpoint), data, test, device),
        progress,
    )
    files = [Path(f"camera{video}") if video.isdecimal() else Path(video) for video in videos]
    # A video of the defaults shows the overlay, as colours flicker more than photographs do.
    kinds = [kind for kind in test.save if kind in KINDS]
    if test.save == PredictOptions.save or not kinds:
        kinds = ["overlay"]
    endings = result_endings(kinds)
    endings = {kind: ending.replace(".png", ".mp4") for kind, ending in endings.items()}
    if "legend" in test.save:
        endings["legend"] = "_legend.png"
    stems = output_stems(files, ".", out, list(endings.values()), elsewhere=files)
    results: list[Result] = []
    for video, stem in zip(videos, stems):
        outputs = {kind: Path(f"{stem}{ending}") for kind, ending in endings.items()}
        try:
            results.append(run.predict(video, outputs))
        except (OSError, ValueError) as error:
            results.append({"image": video, "error": one_line(error)})
            print(f"failed: {video}: {one_line(error).removeprefix(f'{video}: ')}")
    return results


@dataclass
class _Run:
    """What the videos of a command have in common."""

    options: Options
    device: torch.device
    classes: ClassTable
    predictor: Predictor
    progress: bool

    def predict(self, video: str, outputs: dict[str, Path]) -> Result:
        """Segment one video, and print its line."""
        counts = np.zeros(len(self.classes), dtype=np.int64)
        start, frames = time.monotonic(), 0
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            clip = opened.enter_context(Clip(video))
            writers = {
                kind: opened.enter_context(ClipWriter(path, clip.fps, clip.live))
                for kind, path in outputs.items()
                if kind in KINDS
            }
            stop = opened.enter_context(StopRequest())
            bar = opened.enter_context(
                tqdm(
                    total=clip.count,
                    desc=os.path.basename(clip.name),
                    unit="frame",
                    disable=not self.progress,
                    delay=0.1,
                )
            )
            for number, found in self._frames(clip, writers, stop):
                frames += number
                counts += found
                bar.update(number)
        if stop.signal and not frames:
            raise KeyboardInterrupt
        shares = counts / max(1, counts.sum())
        order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
        names, colors = self.classes.names, self.classes.colors
        if "legend" in outputs:
            rows = [names[k] for k in order], colors[order], [float(shares[k]) for k in order]
            legend(*rows, path=outputs["legend"])
        seconds = time.monotonic() - start
        print(f"Predictions in [{clip.name}]:")
        for k in order:
            if shares[k] > 0.001:
                print(f"  {names[k]}: {percent(shares[k])}")
        print(
            f"  {counted(frames, 'frame')} of {clip.size[0]}x{clip.size[1]} pixels at "
            f"{clip.fps:g} per second, in {seconds:.1f} s; results in "
            f"{', '.join(map(str, outputs.values()))}"
        )
        if stop.signal and not clip.live:
            raise KeyboardInterrupt
        return {
            "image": video,
            "size": clip.size,
            "areas": {names[k]: float(shares[k]) for k in order},
            "frames": frames,
            "fps": clip.fps,
            "seconds": seconds / frames,
            "outputs": {kind: str(path) for kind, path in outputs.items()},
        }

    def _frames(
        self, clip: Clip, writers: dict[str, ClipWriter], stop: StopRequest
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number of frames and pixels of each class, of one batch after the other."""
        several, smoothing = iter(clip), Smoothing(self.options.TEST.smooth)
        size = 1 if clip.live else self.options.TEST.batch_size
        enter = partial(use_device, self.device)

        def read(_: int) -> tuple[list[np.ndarray], list[Tensor]]:
            frames = list(islice(several, size))
            inputs = [self.predictor.scales(frame) for frame in frames]
            return frames, [torch.cat(x) for x in zip(*inputs, strict=True)]

        def write(frames: list[np.ndarray], labels: HostCopy) -> tuple[int, np.ndarray]:
            counts = np.zeros(len(self.classes), dtype=np.int64)
            for frame, found in zip(frames, labels.array()):
                counts += class_counts(found, len(self.classes))
                for kind, writer in writers.items():
                    writer.write(np.asarray(render(kind, frame, found, self.classes)))
            return len(frames), counts

        # A frame of a camera is not read ahead, as it would be old when it is computed.
        reading = in_threads(read, repeat(0), 1, 0 if clip.live else 1, enter)
        with (
            on_device(self.device),
            OrderedCalls[tuple[int, np.ndarray]](1, 2, enter) as writing,
            closing(reading),
        ):
            for _, future in reading:
                frames, scales = future.result()
                if not frames or stop.signal:
                    break
                logits = smoothing(self.predictor.logits(scales))
                H, W = frames[0].shape[:2]
                labels = self.predictor.labels(
                    logits, (H, W), scores.label_dtype(len(self.classes))
                )
                yield from writing.add(write, frames, HostCopy(labels))
            yield from writing.rest()
