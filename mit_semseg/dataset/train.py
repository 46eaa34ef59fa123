"""Data set of training batches, aspect-preserving or of random crops."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mit_semseg.config import DataOptions, TrainOptions
from mit_semseg.dataset.aspect import AspectPreserving
from mit_semseg.dataset.base_dataset import BaseDataset
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.mixing import Mixing
from mit_semseg.dataset.records import with_sizes
from mit_semseg.dataset.sample import BatchStyle, LoadedSample, Sample, load_sample
from mit_semseg.dataset.transforms import Normalize, round_up
from mit_semseg.dataset.user_transform import UserTransform
from mit_semseg.errors import one_line

# Independent streams of random numbers: order of a pass, augmentation of a batch, replacement of an
# unusable sample.
_ORDER, _BATCH, _REPLACEMENT = 0, 1, 2
_TRIES = 8  # replacements tried for an unusable sample


class TrainDataset(BaseDataset):
    """An endless, deterministic stream of batches.

    Item i depends only on (seed, i) and the files, so any number of workers, devices and ranks can
    share the stream: rank r of R requests items r, r + R, ... The items of one pass contain each
    image exactly once. A batch has images of one orientation, portrait (height > width) or not; the
    last batch of each orientation in a pass may be smaller.

    With `on_error` "skip" an unusable sample (such as a damaged file, or a mask of the wrong size)
    is replaced by another one, drawn from (seed, i, position in the batch): of its orientation, or
    of the other if there is none. Up to 8 are tried.

    Geometry as published: the batch draws one short side from `imgSizes`; images are resized with
    their aspect ratio kept, flipped at random, aligned to the top left, and padded to the largest
    width and height of the batch, rounded up to `padding_constant`. Images are padded with 0 after
    normalisation (the mean colour), labels with -1; the published code padded labels with class 0.
    With `crop_size` each image draws its own short side and is cropped at random.

    With `batching` "crop" samples are made by `crops.RandomCrops`; every batch has the size
    `crop_size`, and images of both orientations.

    Images are resized as by `ImageFile.pixels`: within one grey level of Pillow, or, if a JPEG of 5
    times the size is decoded at reduced scale, within one level on average. Labels are identical to
    those of the published procedure. All stored values of a mask are checked, including those that
    no label is taken from.

    Args:
        root_dataset: folder that relative paths are relative to.
        odgt: list file, list files, or records.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        batch_per_gpu: images per batch.
        seed: seed of the order and of all augmentation.
        label_map: stored value -> class; None: from `label_offset` and `ignore_label`.
        normalized: False: return uint8 images, for `Normalize` on the device: a quarter of the
            memory, and less work for the loading process.
        pad_to: sides of a batch are multiples of this and of `padding_constant`.
        part: part of the list: `max_sample`, `start_idx`, `end_idx`, see `BaseDataset`.

    Raises:
        FileNotFoundError, ValueError: a list, an option or (when read) a sample cannot be used.
    """

    def __init__(
        self,
        root_dataset: str | os.PathLike[str],
        odgt: Any,
        opt: Any,
        batch_per_gpu: int = 1,
        *,
        seed: int = 304,
        label_map: LabelMap | None = None,
        normalized: bool = True,
        pad_to: int = 1,
        **part: int,
    ) -> None:
        options = DataOptions.read(opt)
        if options.padding_constant % options.segm_downsampling_rate:
            raise ValueError(
                f"DATASET.padding_constant {options.padding_constant} is not a multiple of "
                f"DATASET.segm_downsampling_rate {options.segm_downsampling_rate}"
            )
        TrainOptions(batch_size_per_gpu=batch_per_gpu, shape_bucket=pad_to, seed=seed)  # checks
        self.root_dataset = os.fspath(root_dataset)
        self.batch_per_gpu = batch_per_gpu
        self.seed = seed
        self.normalized = normalized
        self._multiple = math.lcm(options.padding_constant, pad_to)
        super().__init__(odgt, options, label_map=label_map, **part)
        self.list_sample = with_sizes(
            self.list_sample, self.root_dataset, options.on_error, options.bands
        )
        self.num_sample = len(self.list_sample)
        self._style = batch_style(options)
        self._transform = UserTransform(options.transform) if options.transform else None
        self._mixing = Mixing(options)
        if self._mixing and batch_per_gpu < 2:
            raise ValueError(
                "DATASET.cutmix and DATASET.classmix mix samples of one batch, and "
                f"TRAIN.batch_size_per_gpu is {batch_per_gpu}: set it to 2 or more"
            )
        portrait = np.array(
            [self._style.by_orientation and r["height"] > r["width"] for r in self.list_sample]
        )
        self._groups = [np.flatnonzero(portrait), np.flatnonzero(~portrait)]
        self.batches_per_pass = sum(-(-len(group) // batch_per_gpu) for group in self._groups)
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def segm_downsampling_rate(self) -> int:
        """Ratio of the sides of image and label."""
        return self.options.segm_downsampling_rate

    def __len__(self) -> int:
        return 10**10  # the stream is endless

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_order"]  # a cache; it cannot be pickled for spawned workers
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, pass_number: int) -> list[np.ndarray]:
        """Record numbers of all batches of one pass, in order."""
        rng = np.random.default_rng([self.seed, _ORDER, pass_number])
        batches = []
        for group in self._groups:
            order = rng.permutation(group)
            batches += [
                order[start : start + self.batch_per_gpu]
                for start in range(0, len(order), self.batch_per_gpu)
            ]
        return [batches[k] for k in rng.permutation(len(batches))]

    def _numbers(self, index: int) -> list[int]:
        """Record numbers of batch `index`."""
        if index < 0:
            raise IndexError(f"batch {index}: batches are numbered from 0")
        pass_number, position = divmod(index, self.batches_per_pass)
        return [int(k) for k in self._order(pass_number)[position]]

    def files(self, index: int) -> list[str]:
        """Paths of the images of batch `index`, as listed, without loading them.

        With `on_error` "skip" the batch may have replacements instead, see its `info`.
        """
        return [self.list_sample[k]["fpath_img"] for k in self._numbers(index)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Batch `index`.

        Returns:
            `img_data` (B, 3, H, W) float32; `seg_label` (B, H/r, W/r) int64 with -1 ignored, r =
            `segm_downsampling_rate`; `info`, the B image paths as listed. With `normalized` False,
            `img_data` is uint8 RGB in channels_last, and `img_size` (B, 2) int64 has the height and
            width of each image, for `Normalize`. With `on_error` "skip" also `skipped`: a list of
            (image path as listed, reason in one line) of unusable samples. With `depth`, `img_data`
            is (B, 4, H, W) float32, and with `bands` (B, C, H, W) float32, always normalised.
        """
        rng = np.random.default_rng([self.seed, _BATCH, index])
        short = int(rng.choice(self.options.imgSizes))
        usable = [
            self._usable(number, short, rng, [self.seed, _REPLACEMENT, index, position])
            for position, number in enumerate(self._numbers(index))
        ]
        loaded = [sample for _, sample, _ in usable]
        if self._mixing:
            loaded = self._mixing(loaded, rng)
        batch = self._stack([one.sample(self.segm_downsampling_rate) for one in loaded])
        batch["info"] = [self.list_sample[number]["fpath_img"] for number, _, _ in usable]
        if self.options.on_error == "skip":
            batch["skipped"] = [bad for _, _, skipped in usable for bad in skipped]
        return batch

    def _usable(
        self, number: int, short: int, rng: np.random.Generator, seed: list[int]
    ) -> tuple[int, LoadedSample, list[tuple[str, str]]]:
        """The sample of record `number`, or of the first usable replacement.

        Replacements are drawn and augmented by a separate generator with the given seed.

        Returns:
            Number of the record, its sample, and (image path as listed, reason) of unusable ones.
        """
        try:
            return number, self._make(number, short, rng), []
        except (OSError, ValueError) as error:
            if self.options.on_error != "skip":
                raise
            reason = one_line(error)
        skipped = [(self.list_sample[number]["fpath_img"], reason)]
        rng = np.random.default_rng(seed)
        same, other = self._groups if number in self._groups[0] else self._groups[::-1]
        drawn = [*rng.permutation(same[same != number]), *rng.permutation(other)][:_TRIES]
        for candidate in map(int, drawn):
            try:
                return candidate, self._make(candidate, short, rng), skipped
            except (OSError, ValueError) as error:
                skipped.append((self.list_sample[candidate]["fpath_img"], one_line(error)))
        raise ValueError(
            f"{reason}; none of {len(drawn)} random replacements is usable; find the cause with "
            "mit-semseg data check"
        )

    def _make(self, number: int, short: int, rng: np.random.Generator) -> LoadedSample:
        """Loads and augments the sample of record `number`."""
        record = self.list_sample[number]
        plan = self._style.plan((record["width"], record["height"]), short, rng)
        try:
            loaded = load_sample(record, self.root_dataset, plan.size, self.label_map, self.options)
        except (OSError, ValueError):
            # The rest of the batch is drawn as if the rest of this plan had not been, as in earlier
            # versions, so that their runs are resumed exactly with bad files, too.
            rng.bit_generator.state = plan.state
            raise
        loaded = self._style.apply(loaded, plan)
        return loaded if self._transform is None else self._transform(loaded, rng)

    def _stack(self, samples: list[Sample]) -> dict[str, Any]:
        """Pads samples of different sizes to one batch."""
        options = self.options
        rate = options.segm_downsampling_rate
        sizes = [sample.image.shape[:2] for sample in samples]
        H, W = (
            round_up(max(side), self._multiple) for side in zip(*sizes, options.crop_size or (1, 1))
        )
        B = len(samples)
        kind = torch.float32 if options.bands else torch.uint8
        images = torch.zeros(B, H, W, samples[0].image.shape[2], dtype=kind).permute(0, 3, 1, 2)
        targets = torch.full((B, H // rate, W // rate), -1, dtype=torch.int64)
        depths = torch.zeros(B, 1, H, W) if options.depth else None
        for k, (image, labels, depth) in enumerate(samples):
            h, w = sizes[k]
            images[k, :, :h, :w] = torch.from_numpy(image).permute(2, 0, 1)
            if depths is not None and depth is not None:
                depths[k, 0, :h, :w] = torch.from_numpy(depth)
            h, w = labels.shape
            targets[k, :h, :w] = torch.from_numpy(labels)
        if options.bands:  # normalised, so that padding is the mean
            return {"img_data": images, "seg_label": targets}
        img_size = torch.tensor(sizes)
        if self.normalized or depths is not None:  # depth cannot be uint8
            values = Normalize.of(options)(images, img_size)
            values = values if depths is None else torch.cat([values, depths], dim=1)
            return {"img_data": values.contiguous(), "seg_label": targets}
        return {"img_data": images, "img_size": img_size, "seg_label": targets}


def batch_style(options: DataOptions) -> BatchStyle:
    """The batch style of `options.batching`."""
    if options.batching == "crop":
        from mit_semseg.dataset.crops import RandomCrops  # torchvision is slow to import

        return RandomCrops(options)
    return AspectPreserving(options)
