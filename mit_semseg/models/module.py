"""SegmentationModule: encoder, decoder and loss as the one module that is trained and run."""

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
    """What the published toolkit gives modules of one's own that are trained like this one."""

    @torch.no_grad()
    def pixel_acc(self, pred: Tensor, label: Tensor) -> Tensor:
        """Share of the labelled pixels whose most probable class is their label, in [0, 1].

        Args:
            pred: scores, (B, C, h, w).
            label: (B, h, w) int64, negative ones ignored.

        Returns:
            Scalar; 0 where no pixel is labelled.
        """
        valid = label >= 0
        correct = (pred.argmax(1) == label) & valid
        return correct.sum() / (valid.sum() + 1e-10)


class SegmentationModule(SegmentationModuleBase):
    """Encoder + decoder + loss.

    Call `module(feed_dict)` for training and `module(feed_dict, segSize=(H, W))` for
    probabilities; `logits` takes plain tensors. All of them work whatever the decoder's
    `use_softmax` is. Whole images are predicted by `mit_semseg.Segmenter`.
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
        """Put the parts together.

        Args:
            net_enc: the encoder.
            net_dec: a decoder for its feature maps.
            crit: `crit(log_probs (B, C, h, w), label (B, h, w))` -> scalar mean over the pixels
                not labelled -1. With a method `denominator(label)` it says what that mean divides
                by; otherwise the number of those pixels is assumed. None: inference only.
            deep_sup_scale: weight of the losses of auxiliary heads that have none of their own.
            normalize: `normalize(uint8 images, sizes)` -> float images as the encoder expects
                them, for batches that come as bytes (see `dataset.transforms.Normalize`).
            mirror_pairs: classes that a mirror turns into each other, such as left and right arm.
            aux_weights: of the losses of all auxiliary heads, in place of `deep_sup_scale` and of
                the weights that the decoder declares; empty: as declared.

        Raises:
            TypeError: the decoder does not have the interface of `decoders.Decoder`.
            ValueError: `mirror_pairs` names a class that the decoder does not have, or
                `aux_weights` are neither none nor one for each auxiliary head.
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
        self.input_dtype: torch.dtype | None = None  # what images are cast to; None: as they are
        # How training enters the two; `compile_for_training` puts compiled functions here.
        self.encode: Callable[..., list[Tensor]] = encode
        self.decode: Callable[..., tuple[Tensor, ...]] = decode
        self.mirror_pairs = tuple((a, b) for a, b in mirror_pairs)
        if any(not 0 <= k < net_dec.num_class for pair in self.mirror_pairs for k in pair):
            raise ValueError(
                f"mirror_pairs are {self.mirror_pairs}, the classes 0 to {net_dec.num_class - 1}"
            )
        self.aux_weights = tuple(aux_weights)
        check_head_weights(self.aux_weights, net_dec.auxiliary, type(net_dec).__name__)
        asks = any(head.weight is None for head in net_dec.auxiliary)
        if deep_sup_scale is not None and not asks:
            warnings.warn(
                f"deep_sup_scale {deep_sup_scale} is ignored: {type(net_dec).__name__} has no "
                "auxiliary head that it could weigh",
                stacklevel=2,
            )

    def forward(
        self,
        feed_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        segSize: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Loss and accuracy, or probabilities when `segSize` is given.

        Args:
            feed_dict: `img_data` (B, 3, H, W), float as the encoder expects it, or uint8, which is
                normalised here, on the device it has come to, with `img_size` (B, 2) int64 saying
                where in the batch each image ends; for the loss also `seg_label` (B, h, w) int64
                with -1 ignored, of any size: logits are resized to it. `loss_weight` and
                `acc_weight`, scalars, multiply loss and accuracy, and `own_weights` (n,) those
                losses whose heads have denominators of their own (see `prepare_scatter`). A list
                holding one such dict is taken for it.
            segSize: (H, W) of the probabilities.

        Returns:
            Scalars (loss, pixel accuracy over the labelled pixels), or probabilities
            (B, num_class, *segSize).

        Raises:
            TypeError: the batch is not a dict.
            ValueError: an entry is missing, or several batches came at once.
        """
        batch = _one_batch(feed_dict)
        images = self.inputs(_entry(batch, "img_data"), batch.get("img_size"))
        sides = (images.shape[-2], images.shape[-1])
        # Functions of the parts, not of this module: copies of it can share them.
        enter, leave = (self.encode, self.decode) if self.training else (encode, decode)
        with _named_single_values(images):
            features = enter(self.encoder, images)
        if segSize is not None:
            return self.decoder.probabilities(features, (int(segSize[0]), int(segSize[1])), sides)

        label = _entry(batch, "seg_label")
        size = (label.shape[-2], label.shape[-1])
        with _named_single_values(images):
            main, *auxiliary = leave(self.decoder, features, size, sides)
        trains = self.decoder.trains_scores
        loss = self._loss(main, label) if trains else main.new_zeros(())
        own: list[Tensor] = []  # losses that are means over something else
        weights = self._weights() if auxiliary else ()
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
        """The encoder's feature maps, deepest last, of images as for `logits`."""
        return self.encoder(self.inputs(image), return_feature_maps=True)

    def logits(self, image: Tensor) -> Tensor:
        """Main-head scores at the network's resolution.

        Args:
            image: (B, 3, H, W), float as the encoder expects it, or uint8.

        Returns:
            (B, num_class, h, w), h and w at most H and W.

        Raises:
            ValueError: bytes, and the module has no `normalize`.
        """
        logits = self.decoder.logits(self.features(image))[0]
        return crop(logits, (image.shape[-2], image.shape[-1]))

    def prepare_scatter(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Weighs replicas by what they have to learn from.

        Args:
            batches: one dict per replica, on any device; labels are counted where they are.

        Returns:
            New dicts with `loss_weight`, `acc_weight` and `own_weights`, such that the plain mean
            over replicas is the mean over the union of their valid pixels, or of whatever else a
            head's own loss is a mean of. Dicts without labels are unchanged.
        """
        if not all("seg_label" in batch for batch in batches):
            return [dict(batch) for batch in batches]
        labels = [batch["seg_label"] for batch in batches]
        # On the host as a rule, as the loader gives them; those on GPUs are not waited for.
        sums = torch.stack([self._denominators(label).to(labels[0].device) for label in labels])
        weights = _shares(sums, sums.sum(0), len(batches))
        return [
            {**batch, "loss_weight": weight[0], "acc_weight": weight[1], "own_weights": weight[2:]}
            for batch, weight in zip(batches, weights, strict=True)
        ]

    def _weights(self) -> Sequence[float]:
        """Of the losses of the auxiliary heads, in their order."""
        if self.aux_weights:
            return self.aux_weights
        weights: list[float] = []
        for head in self.decoder.auxiliary:
            weight = self.deep_sup_scale if head.weight is None else head.weight
            if weight is None:
                raise ValueError(
                    f"{type(self.decoder).__name__} has an auxiliary head to train: give "
                    "SegmentationModule a deep_sup_scale (0.4 as published)"
                )
            weights.append(weight)
        return weights

    def inputs(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """What the encoder takes: images as for `logits`, normalised if they are bytes."""
        wanted = getattr(self.encoder, "in_channels", images.shape[1])
        if images.shape[1] != wanted:
            raise ValueError(
                f"the images have {images.shape[1]} channels and the encoder takes {wanted}: see "
                "MODEL.in_channels and DATASET.depth"
            )
        if images.is_floating_point():
            return images if self.input_dtype is None else images.to(self.input_dtype)
        if self.normalize is None:
            raise ValueError(
                f"the images are {images.dtype}, and this module has no `normalize` for them: "
                "give normalised float images, or build it with ModelBuilder.from_config"
            )
        normalized: Tensor = self.normalize(images, sizes)
        return normalized if self.input_dtype is None else normalized.to(self.input_dtype)

    def _loss(self, log_probs: Tensor, label: Tensor) -> Tensor:
        if self.crit is None:
            raise ValueError("this module was built for inference (crit is None): pass segSize")
        if hasattr(self.crit, "denominator"):
            return self.crit(log_probs, label)
        # A mean over no pixels is 0/0 in torch's own losses: give it some, and take it times 0.
        some = (label != functional.IGNORED).any()
        return self.crit(log_probs, torch.where(some, label, torch.zeros_like(label))) * some

    def _denominators(self, label: Tensor) -> Tensor:
        """(2 + n,): what the loss's mean divides by, the number of valid pixels; n heads' own."""
        denominator: Callable[[Tensor], Tensor] | None = getattr(self.crit, "denominator", None)
        if denominator is not None:
            of_loss = denominator(label)
        else:
            of_loss = functional.denominator(label, getattr(self.crit, "weight", None))
        valid = functional.denominator(label)
        heads = [head.denominator(label) for head in self.decoder.auxiliary if head.denominator]
        own = [part for found in heads for part in found.reshape(-1).unbind()]
        # In float64: the shares are to be exact for losses in float64 too.
        return torch.stack([x.detach().double() for x in (of_loss, valid, *own)])

    def _share_of_ranks(self, label: Tensor) -> Tensor:
        """(2 + n,) weights of this rank's loss, accuracy and n heads' own, among all ranks'."""
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
    """Refuses weights that are neither none nor one for each auxiliary head.

    Args:
        weights: `TRAIN.aux_weights`.
        heads: those that the decoder declares.
        decoder: its name, for the error.
    """
    if len(weights) not in (0, len(heads)):
        raise ValueError(
            f"TRAIN.aux_weights are {list(weights)}; auxiliary heads of {decoder}: {len(heads)}; "
            "give one weight for each, or () for its own"
        )


def _shares(own: Tensor, total: Tensor, count: int) -> Tensor:
    """count * own / total; 0 where there is nothing to share."""
    return count * own / torch.where(total > 0, total, torch.ones_like(total))


@contextlib.contextmanager
def _named_single_values(images: Tensor) -> Iterator[None]:
    """Says what to do where a BatchNorm in training has one value a channel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        sides = " x ".join(str(side) for side in images.shape[-2:])
        raise ValueError(
            f"a batch of {len(images)} with {sides} pixels leaves BatchNorm one value a channel, "
            "which has no variance: take larger images or crops, a larger "
            "TRAIN.batch_size_per_gpu, or TRAIN.fix_bn True"
        ) from error


def _one_batch(feed_dict: Any) -> Mapping[str, Any]:
    # A loader made for several devices yields a list with one dict per device.
    if isinstance(feed_dict, (list, tuple)):
        if len(feed_dict) != 1:
            raise ValueError(
                f"SegmentationModule takes one batch, got a list of {len(feed_dict)}: wrap it in "
                "UserScatteredDataParallel, or pass one dict at a time"
            )
        feed_dict = feed_dict[0]
    if not isinstance(feed_dict, Mapping):
        raise TypeError(
            f"SegmentationModule takes a dict with img_data, got {type(feed_dict).__name__}"
        )
    return feed_dict


def _entry(batch: Mapping[str, Any], key: str) -> Tensor:
    if key not in batch:
        hint = " (or pass segSize to predict)" if key == "seg_label" else ""
        raise ValueError(f"the batch has no {key!r}{hint}; it has: {', '.join(sorted(batch))}")
    return batch[key]
