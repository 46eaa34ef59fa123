"""Output of a prediction: progress bar, class areas of each image, and summary."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mit_semseg.errors import counted

Result = dict[str, Any]


class Report:
    """A progress bar, and class areas and times in the order of the images.

    Attributes:
        results: number of a batch -> its results.
    """

    def __init__(self, batches: Sequence[tuple[int, Sequence[object]]], shown: bool) -> None:
        self.results: dict[int, list[Result]] = {}
        self._due = deque(number for number, _ in batches)
        self._bar = tqdm(
            total=sum(len(tasks) for _, tasks in batches),
            desc="predicting",
            unit="img",
            disable=not shown,
            delay=0.1,  # not before the model is loaded, which is logged
        )

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, done: tuple[int, list[Result]]) -> None:
        """Add the results of a batch; the order of batches is arbitrary."""
        number, self.results[number] = done
        self._bar.update(len(self.results[number]))
        while self._due and self._due[0] in self.results:
            for one in self.results[self._due.popleft()]:
                if "error" not in one:
                    tqdm.write(_text(one))


def _text(result: Mapping[str, Any]) -> str:
    lines = [f"Predictions in [{result['image']}]:"]
    for name, share in result["areas"].items():
        if 100 * share > 0.1:
            lines.append(f"  {name}: {100 * share:.2f}%")
    width, height = result["size"]
    scales = ", ".join(
        f"{w}x{h}" + ("" if seconds is None else f" {seconds:.3f} s")
        for w, h, seconds in result["scales"]
    )
    lines.append(f"  {width}x{height} pixels in {result['seconds']:.3f} s; scales: {scales}")
    return "\n".join(lines)


def print_summary(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    failed = [one for one in results if "error" in one]
    done = len(results) - len(failed)
    if done:
        seconds = sum(one.get("seconds", 0.0) for one in results) / done
        print(f"{counted(done, 'image')} segmented, {seconds:.3f} s each; results in {out}")
    if failed:
        print(f"{len(failed)} of {counted(len(results), 'image')} failed:")
        for one in failed:
            # Most messages begin with the file.
            print(f"  {one['image']}: {one['error'].removeprefix(one['image'] + ': ')}")
