"""SegmentationModule: encoder, decoder and loss in one module, for training and prediction."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mit_semseg.losses import functional
from mit_semseg.models.decoders import Decoder
from mit_semseg.models.decoders.base import crop
from mit_semseg.models.encoders import Encoder


class SegmentationModuleBase(nn.Module):
    """Base class of custom segmentation modules, as in the published toolkit."""

    @torch.no_grad()
    def pixel_acc(self, pred: Tensor, label: Tensor) -> Tensor:
        """Pixel accuracy: the fraction of labelled pixels that are classified correctly.

        Args:
            pred: scores, (B, C, h, w).
            label: (B, h, w) int64, negative values ignored.

        Returns:
            Scalar in [0, 1]; 0 if no pixel is labelled.
        """
        valid = label >= 0
        correct = (pred.argmax(1) == label) & valid
        return correct.sum() / (valid.sum() + 1e-10)


class SegmentationModule(SegmentationModuleBase):
    """Encoder + decoder + loss.

    `module(feed_dict)` returns the loss and `module(feed_dict, segSize=(H, W))` probabilities;
    `logits` takes plain tensors. None of them depends on the decoder's `use_softmax`. To predict
    image files, use `mit_semseg.Segmenter`.
    """

    def __init__(
        self,
        net_enc: Encoder,
        net_dec: Decoder,
        crit: nn.Module | None,
        deep_sup_scale: float | None = None,
        normalize: nn.Module | None = None,
        mirror_pairs: Iterable[tuple[int, int]] = (),
        aux_weights: Sequence[float] = (),
    ) -> None:
        """Initialise the module.

        Args:
            net_enc: the encoder.
            net_dec: a decoder for its feature maps.
            crit: `crit(log_probs (B, C, h, w), label (B, h, w))` -> scalar mean over the pixels
                not labelled -1. Its method `denominator(label)`, if any, returns what that mean
                is divided by; otherwise the number of those pixels is assumed. None: inference
                only.
            deep_sup_scale: weight of the losses of auxiliary heads that declare no weight.
            normalize: `normalize(uint8 images, sizes)` -> float images as the encoder expects
                them, for uint8 batches (see `dataset.transforms.Normalize`).
            mirror_pairs: pairs of classes that a horizontal flip exchanges, such as left and
                right arm.
            aux_weights: weights of the losses of all auxiliary heads, instead of `deep_sup_scale`
                and of the weights that the decoder declares; empty: as declared.

        Raises:
            TypeError: the decoder does not have the interface of `decoders.Decoder`.
            ValueError: `mirror_pairs` has a class that the decoder does not have, or the number
                of `aux_weights` is wrong.
        """
        super().__init__()
        if not hasattr(net_dec, "log_probabilities"):
            raise TypeError(
                f"net_dec is a {type(net_dec).__name__}: derive it from "
                "mit_semseg.models.decoders.Decoder, and give it a method `logits`"
            )
        self.encoder = net_enc
        self.decoder = net_dec
        self.crit = crit
        self.deep_sup_scale = deep_sup_scale
        self.normalize = normalize
        self.input_dtype: torch.dtype | None = None  # what images are cast to; None: not cast
        # Used in training; `compile_for_training` replaces them by compiled functions.
        self.encode: Callable[..., list[Tensor]] = encode
        self.decode: Callable[..., tuple[Tensor, ...]] = decode
        self.mirror_pairs = tuple((a, b) for a, b in mirror_pairs)
        if any(not 0 <= k < net_dec.num_class for pair in self.mirror_pairs for k in pair):
            raise ValueError(
                f"mirror_pairs are {self.mirror_pairs}; classes are 0 to {net_dec.num_class - 1}"
            )
        self.aux_weights = tuple(aux_weights)
        check_head_weights(self.aux_weights, net_dec.auxiliary, type(net_dec).__name__)
        if deep_sup_scale is not None and all(
            head.weight is not None for head in net_dec.auxiliary
        ):
            warnings.warn(
                f"deep_sup_scale {deep_sup_scale} is ignored: {type(net_dec).__name__} has no "
                "auxiliary head without a weight",
                stacklevel=2,
            )

    def forward(
        self,
        feed_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        segSize: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Loss and pixel accuracy, or probabilities if `segSize` is given.

        Args:
            feed_dict: `img_data` (B, 3, H, W), either float as the encoder expects it, or uint8,
                which is normalised here; `img_size` (B, 2) int64, the size of each image in a
                padded uint8 batch; for the loss, `seg_label` (B, h, w) int64 with -1 ignored, of
                any size: logits are resized to it. Optional (see `prepare_scatter`):
                `loss_weight` and `acc_weight`, scalar factors of loss and accuracy, and
                `own_weights` (n,), factors of the losses of heads with a `denominator`. A list
                with one such dict is accepted.
            segSize: (H, W) of the probabilities.

        Returns:
            Scalars (loss, pixel accuracy), or probabilities (B, num_class, *segSize).

        Raises:
            TypeError: the batch is not a dict.
            ValueError: an entry is missing, or the list has several batches.
        """
        batch = _one_batch(feed_dict)
        images = self.inputs(_entry(batch, "img_data"), batch.get("img_size"))
        sides = (images.shape[-2], images.shape[-1])
        # Functions of encoder and decoder, not bound methods, so that copies can share them.
        encoding, decoding = (self.encode, self.decode) if self.training else (encode, decode)
        with _explain_single_values(images):
            features = encoding(self.encoder, images)
        if segSize is not None:
            return self.decoder.probabilities(features, (int(segSize[0]), int(segSize[1])), sides)

        label = _entry(batch, "seg_label")
        size = (label.shape[-2], label.shape[-1])
        with _explain_single_values(images):
            main, *auxiliary = decoding(self.decoder, features, size, sides)
        trains = self.decoder.trains_scores
        loss = self._loss(main, label) if trains else main.new_zeros(())
        own: list[Tensor] = []  # losses of heads with a denominator
        weights = self._head_weights() if auxiliary else ()
        for head, weight, output in zip(self.decoder.auxiliary, weights, auxiliary):
            value = weight * (head.loss or self._loss)(output, label)
            if head.denominator:
                own.extend(value.reshape(-1).unbind())
            else:
                loss = loss + value
        accuracy = self.pixel_acc(main, label)

        if "loss_weight" in batch:
            loss_weight, acc_weight = batch["loss_weight"], _entry(batch, "acc_weight")
            own_weights = list(_entry(batch, "own_weights")) if own else []
        elif self.training and dist.is_available() and dist.is_initialized():
            loss_weight, acc_weight, *own_weights = self._share_of_ranks(label)
        else:
            return sum(own, loss), accuracy
        loss = loss * loss_weight.to(loss.dtype)
        for value, weight in zip(own, own_weights, strict=True):
            loss = loss + value * weight.to(value.dtype)
        return loss, accuracy * acc_weight.to(accuracy.dtype)

    def features(self, image: Tensor) -> list[Tensor]:
        """The encoder's feature maps, deepest last; `image` as in `logits`."""
        return self.encoder(self.inputs(image), return_feature_maps=True)

    def logits(self, image: Tensor) -> Tensor:
        """Scores of the main head at the network's resolution.

        Args:
            image: (B, 3, H, W), float as the encoder expects it, or uint8.

        Returns:
            (B, num_class, h, w), h <= H and w <= W.

        Raises:
            ValueError: the images are uint8 and the module has no `normalize`.
        """
        logits = self.decoder.logits(self.features(image))[0]
        return crop(logits, (image.shape[-2], image.shape[-1]))

    def prepare_scatter(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Weights the losses of replicas by their numbers of labelled pixels.

        Args:
            batches: one dict per replica, on any device; labels are counted there.

        Returns:
            New dicts with `loss_weight`, `acc_weight` and `own_weights`: with these factors the
            mean over replicas is the mean over all their labelled pixels, or over what the
            `denominator` of a head counts. Dicts without labels are copied unchanged.
        """
        if not all("seg_label" in batch for batch in batches):
            return [dict(batch) for batch in batches]
        labels = [batch["seg_label"] for batch in batches]
        # Labels are usually still on the CPU; for those on a GPU, this does not synchronise.
        sums = torch.stack([self._denominators(label).to(labels[0].device) for label in labels])
        weights = _shares(sums, sums.sum(0), len(batches))
        return [
            {**batch, "loss_weight": weight[0], "acc_weight": weight[1], "own_weights": weight[2:]}
            for batch, weight in zip(batches, weights, strict=True)
        ]

    def _head_weights(self) -> Sequence[float]:
        """Weights of the losses of the auxiliary heads, in their order."""
        if self.aux_weights:
            return self.aux_weights
        weights: list[float] = []
        for head in self.decoder.auxiliary:
            weight = self.deep_sup_scale if head.weight is None else head.weight
            if weight is None:
                raise ValueError(
                    f"{type(self.decoder).__name__} has an auxiliary head without a weight: give "
                    "SegmentationModule a deep_sup_scale (published: 0.4)"
                )
            weights.append(weight)
        return weights

    def inputs(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The input of the encoder: images as in `logits`, normalised if they are uint8."""
        expected = getattr(self.encoder, "in_channels", images.shape[1])
        if images.shape[1] != expected:
            raise ValueError(
                f"the images have {images.shape[1]} channels and the encoder expects {expected}: "
                "see MODEL.in_channels, DATASET.bands and DATASET.depth"
            )
        if images.is_floating_point():
            return images if self.input_dtype is None else images.to(self.input_dtype)
        if self.normalize is None:
            raise ValueError(
                f"the images are {images.dtype}, and this module has no `normalize`: pass "
                "normalised float images, or build the module with ModelBuilder.from_config"
            )
        normalized: Tensor = self.normalize(images, sizes)
        return normalized if self.input_dtype is None else normalized.to(self.input_dtype)

    def _loss(self, log_probs: Tensor, label: Tensor) -> Tensor:
        if self.crit is None:
            raise ValueError("this module was built for inference (crit is None): pass segSize")
        if hasattr(self.crit, "denominator"):
            return self.crit(log_probs, label)
        # In torch's losses a mean over no pixels is NaN: label some, and multiply by 0.
        some = (label != functional.IGNORED).any()
        return self.crit(log_probs, torch.where(some, label, torch.zeros_like(label))) * some

    def _denominators(self, label: Tensor) -> Tensor:
        """(2 + n,): denominator of the loss, number of labelled pixels, n heads' denominators."""
        denominator: Callable[[Tensor], Tensor] | None = getattr(self.crit, "denominator", None)
        if denominator is not None:
            of_loss = denominator(label)
        else:
            of_loss = functional.denominator(label, getattr(self.crit, "weight", None))
        valid = functional.denominator(label)
        heads = [head.denominator(label) for head in self.decoder.auxiliary if head.denominator]
        own = [part for found in heads for part in found.reshape(-1).unbind()]
        # In float64, which Apple GPUs lack, so that the weights are exact for losses in float64.
        dtype = torch.float32 if label.device.type == "mps" else torch.float64
        return torch.stack([x.detach().to(dtype) for x in (of_loss, valid, *own)])

    def _share_of_ranks(self, label: Tensor) -> Tensor:
        """(2 + n,): this rank's weights of loss, accuracy and the losses of n heads."""
        own = self._denominators(label)
        total = own.clone()
        dist.all_reduce(total)
        return _shares(own, total, dist.get_world_size())


def encode(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """All feature maps, deepest last."""
    return encoder(images, return_feature_maps=True)


def decode(
    decoder: Decoder, features: list[Tensor], size: tuple[int, int], image: tuple[int, int]
) -> tuple[Tensor, ...]:
    """`Decoder.log_probabilities`."""
    return decoder.log_probabilities(features, size, image)


def check_head_weights(weights: Sequence[float], heads: Sequence[object], decoder: str) -> None:
    """Checks that there are no weights, or one for each auxiliary head.

    Args:
        weights: `TRAIN.aux_weights`.
        heads: `Decoder.auxiliary`.
        decoder: its name, for the error.

    Raises:
        ValueError: the number of weights is wrong.
    """
    if len(weights) not in (0, len(heads)):
        raise ValueError(
            f"TRAIN.aux_weights is {list(weights)}; auxiliary heads of {decoder}: {len(heads)}; "
            "set one weight for each, or () for the declared weights"
        )


def _shares(own: Tensor, total: Tensor, count: int) -> Tensor:
    """count * own / total; 0 if the total is 0."""
    return count * own / torch.where(total > 0, total, torch.ones_like(total))


@contextlib.contextmanager
def _explain_single_values(images: Tensor) -> Iterator[None]:
    """Adds advice to torch's error if a BatchNorm in training has one value per channel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        sides = " x ".join(str(side) for side in images.shape[-2:])
        raise ValueError(
            f"a batch of {len(images)} with {sides} pixels leaves BatchNorm one value per "
            "channel, which has no variance: use larger images or crops, a larger "
            "TRAIN.batch_size_per_gpu, or TRAIN.fix_bn True"
        ) from error


def _one_batch(feed_dict: Any) -> Mapping[str, Any]:
    # A loader for several devices yields a list with one dict per device.
    if isinstance(feed_dict, (list, tuple)):
        if len(feed_dict) != 1:
            raise ValueError(
                f"SegmentationModule expects one batch, got a list of {len(feed_dict)}: wrap the "
                "module in UserScatteredDataParallel, or pass one dict at a time"
            )
        feed_dict = feed_dict[0]
    if not isinstance(feed_dict, Mapping):
        raise TypeError(
            f"SegmentationModule expects a dict with img_data, got {type(feed_dict).__name__}"
        )
    return feed_dict


def _entry(batch: Mapping[str, Any], key: str) -> Tensor:
    if key not in batch:
        hint = " (or pass segSize to predict)" if key == "seg_label" else ""
        raise ValueError(f"the batch has no {key!r}{hint}; its keys: {', '.join(sorted(batch))}")
    return batch[key]
