"""The published procedure, implemented with the modules of this package, for comparison.

It uses float32, contiguous memory, one image at a time, scores of all classes at full size, NumPy
for metrics and colours, and Pillow for images. On GPUs with TensorFloat-32, convolutions use it and
matrix products do not, as is torch's default. Networks compute the same function with the same
weights; `as_published` replaces our faster layers by torch's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mit_semseg.models import Decoder, SegmentationModule
from mit_semseg.models.depthwise import DepthwiseConv2d


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Context with torch's defaults for TensorFloat-32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = True, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


# ------------------------------------------------------------------------------ the network
class _AdaptivePools(Decoder):
    """Mixin that pools with torch's kernels."""

    def pools(self, x: Tensor, tile: object) -> list[Tensor]:
        return [F.adaptive_avg_pool2d(x, scale) for scale in self.pool_scales]


def as_published(module: SegmentationModule) -> SegmentationModule:
    """A copy with the same weights and torch's layers only, in contiguous memory."""
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DepthwiseConv2d):
                setattr(parent, name, _plain_convolution(child))
    kind = type(plain.decoder)
    decoder: Decoder = nn.Module.__new__(type(kind.__name__, (_AdaptivePools, kind), {}))
    decoder.__dict__.update(plain.decoder.__dict__)
    plain.decoder = decoder
    return plain


def _plain_convolution(layer: nn.Conv2d) -> nn.Conv2d:
    shape = layer.in_channels, layer.out_channels, layer.kernel_size
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    plain = nn.Conv2d(*shape, *geometry, bias=layer.bias is not None)  # type: ignore[arg-type]
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


@torch.no_grad()
def class_scores(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean over scales of the softmax of the resized logits, (N, C, H, W)."""
    N, C = logits[0].shape[:2]
    scores = torch.zeros(N, C, *size, device=logits[0].device)
    for one in logits:
        resized = F.interpolate(one, size, mode="bilinear", align_corners=False)
        scores = scores + F.softmax(resized, dim=1) / len(logits)
    return scores


@torch.no_grad()
def class_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Class of every pixel, (N, H, W) int64, from logits of all scales."""
    if len(logits) == 1:
        resized = F.interpolate(logits[0], size, mode="bilinear", align_corners=False)
        return torch.max(F.softmax(resized, dim=1), dim=1)[1]
    return torch.max(class_scores(logits, size), dim=1)[1]


@torch.no_grad()
@torch_defaults()
def predict(
    module: SegmentationModule, image: np.ndarray, sizes: Sequence[int], longest: int = 1000
) -> np.ndarray:
    """Class of every pixel of one image, averaged over scales.

    Args:
        module: `as_published`, in evaluation mode.
        image: (H, W, 3) uint8 RGB.
        sizes: short sides.
        longest: limit of the long side.

    Returns:
        (H, W) int64.
    """
    H, W = image.shape[:2]
    device = next(module.parameters()).device
    scores = torch.zeros(1, module.decoder.num_class, H, W, device=device)
    for short in sizes:
        scale = min(short / min(H, W), longest / max(H, W))
        height, width = (-(-int(side * scale) // 8) * 8 for side in (H, W))
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        data = _normalized(np.asarray(resized))[None].to(device)
        scores = scores + module({"img_data": data}, segSize=(H, W)) / len(sizes)
    _, labels = torch.max(scores, dim=1)
    return labels[0].cpu().numpy()


@torch_defaults()
def train_step(
    module: SegmentationModule,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: dict[str, Tensor],
) -> float:
    """Forward, backward and one step of the optimizers in float32; returns the loss."""
    module.zero_grad()
    loss, accuracy = module(batch)
    loss, accuracy = loss.mean(), accuracy.mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------ data
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _normalized(image: np.ndarray) -> Tensor:
    values = np.float32(np.array(image)) / 255.0
    tensor = torch.from_numpy(values.transpose((2, 0, 1)).copy())
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (tensor - mean) / std


def training_batch(
    pairs: Sequence[tuple[str, str]], short: int, longest: int, flips: Sequence[bool]
) -> dict[str, Tensor]:
    """A padded batch from image and mask files, with labels at an eighth of the size.

    Args:
        pairs: image and mask of each sample.
        short: short side of the batch.
        longest: limit of the long side.
        flips: which samples are flipped.

    Returns:
        `img_data` (B, 3, H, W) float32 and `seg_label` (B, H/8, W/8) int64, -1 ignored.
    """
    sizes = []
    for path, _ in pairs:
        with Image.open(path) as image:
            W, H = image.size
        scale = min(short / min(H, W), longest / max(H, W))
        sizes.append((int(H * scale), int(W * scale)))
    height, width = (-(-max(side) // 8) * 8 for side in zip(*sizes))
    images = torch.zeros(len(pairs), 3, height, width)
    labels = torch.zeros(len(pairs), height // 8, width // 8, dtype=torch.int64)
    for k, ((path, mask_path), (h, w), flip) in enumerate(zip(pairs, sizes, flips)):
        photo = Image.open(path).convert("RGB")
        mask: Image.Image = Image.open(mask_path)
        if flip:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        photo = photo.resize((w, h), Image.Resampling.BILINEAR)
        mask = mask.resize((w, h), Image.Resampling.NEAREST)
        # Padded with 0 to a multiple of 8, then resized to an eighth by nearest neighbour.
        rounded = Image.new("L", (-(-w // 8) * 8, -(-h // 8) * 8), 0)
        rounded.paste(mask, (0, 0))
        small = rounded.resize(
            (rounded.size[0] // 8, rounded.size[1] // 8), Image.Resampling.NEAREST
        )
        data = _normalized(np.asarray(photo))
        target = torch.from_numpy(np.array(small)).long() - 1
        images[k, :, : data.shape[1], : data.shape[2]] = data
        labels[k, : target.shape[0], : target.shape[1]] = target
    return {"img_data": images, "seg_label": labels}


# ------------------------------------------------------------------------------ metrics
def count(
    prediction: np.ndarray, label: np.ndarray, num_class: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Pixel accuracy, and intersection and union of every class, from three histograms.

    Args:
        prediction: (H, W) class ids.
        label: (H, W) class ids, -1 ignored.
        num_class: number of classes.
    """
    valid = label >= 0
    accuracy = float((valid * (prediction == label)).sum()) / (valid.sum() + 1e-10)
    predicted, labelled = np.asarray(prediction).copy() + 1, np.asarray(label).copy() + 1
    predicted = predicted * (labelled > 0)
    agreed = predicted * (predicted == labelled)
    areas = [
        np.histogram(x, bins=num_class, range=(1, num_class))[0]
        for x in (agreed, predicted, labelled)
    ]
    return accuracy, areas[0], areas[1] + areas[2] - areas[0]


def color_encode(labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Labels (H, W) -> colours (H, W, 3) uint8, class by class."""
    labels = labels.astype("int")
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    for label in np.unique(labels):
        if label < 0:
            continue
        image += (labels == label)[:, :, np.newaxis] * np.tile(
            colors[label], (*labels.shape, 1)
        ).astype(np.uint8)
    return image
