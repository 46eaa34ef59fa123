"""The loss of mask classification networks: each class of an image is matched with one query.

Labels are (B, H, W) int64, -1 ignored. The targets are the masks of the classes that occur in an
image; ignored pixels are in none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mit_semseg.losses.functional import widened

Predictions = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MaskClassificationLoss:
    """Cross entropy of the queries' classes, and cross entropy and Dice of their masks at points.

    Papers: Cheng et al. 2022 (Mask2Former), arXiv:2112.01527, sec. 3.3; matching of Carion et al.
    2020 (DETR), arXiv:2005.12872, eq. 1; points of Kirillov et al. 2020 (PointRend),
    arXiv:1912.08193, sec. 3.3.

    Attributes:
        class_weight, mask_weight, dice_weight: weights of the three losses, and of the costs of the
            matching.
        no_object: class weight of "no object", the target of unmatched queries.
        points: number of points at which masks are compared. For the loss, three quarters of them
            are the most uncertain ones of three times as many random points.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544

    def __call__(self, predictions: Predictions, label: Tensor) -> Tensor:
        """The losses, summed over the layers.

        Args:
            predictions: for each layer, class scores (B, Q, C + 1), "no object" last, and mask
                scores (B, Q, h, w) of any size.
            label: (B, H, W) int64, -1 ignored.

        Returns:
            (2,) float32: the class loss, a mean over queries, and the mask losses, a mean over
            masks; for the denominators see `counts`.
        """
        num_class = predictions[0][0].shape[-1] - 1
        there = classes_there(label, num_class).cpu()
        ids = [row.nonzero()[:, 0].to(label.device) for row in there]
        masks = [(one == k[:, None, None]).float() for one, k in zip(label, ids)]
        total = torch.zeros(2, device=label.device)
        for classes, scores in predictions:
            total = total + self._of_layer(widened(classes), widened(scores), ids, masks)
        return total

    def counts(self, label: Tensor, num_class: int, queries: int) -> Tensor:
        """Denominators of the losses of a label (B, H, W): (2,) float, weights and masks."""
        masks = classes_there(label, num_class).sum(1)
        matched = masks.clamp(max=queries).sum()
        rest = len(label) * queries - matched
        return torch.stack([matched + self.no_object * rest, masks.sum()]).float()

    def _of_layer(
        self, classes: Tensor, scores: Tensor, ids: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> Tensor:
        pairs = self.match(classes, scores, ids, masks)
        num_class = classes.shape[-1] - 1
        wanted = torch.full(classes.shape[:2], num_class, device=classes.device)
        for row, (queries, targets), k in zip(wanted, pairs, ids):
            row[queries] = k[targets]
        weight = classes.new_ones(num_class + 1)
        weight[-1] = self.no_object
        of_classes = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight)
        found = torch.cat([x[queries] for x, (queries, _) in zip(scores, pairs)])[:, None]
        true = torch.cat([x[targets] for x, (_, targets) in zip(masks, pairs)])[:, None]
        count = sum(len(k) for k in ids)
        if not count:
            return torch.stack([self.class_weight * of_classes, 0.0 * scores.sum()])
        with torch.no_grad():
            points = self._uncertain_points(found)
            there = at_points(true, points)
        here = at_points(found, points)
        bce = F.binary_cross_entropy_with_logits(here, there, reduction="none").mean(1)
        of_masks = self.mask_weight * bce + self.dice_weight * _dice(here.sigmoid(), there)
        return torch.stack([self.class_weight * of_classes, of_masks.sum() / count])

    @torch.no_grad()
    def match(
        self, classes: Tensor, scores: Tensor, ids: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The assignment of masks to queries with the lowest cost, for each image.

        Args:
            classes: (B, Q, C + 1).
            scores: (B, Q, h, w).
            ids: for each image, the classes that occur in it.
            masks: for each image, their masks, (N, H, W) float.

        Returns:
            For each image, indices of queries and of the masks matched with them.
        """
        costs = []
        for probabilities, score, k, mask in zip(classes.softmax(-1), scores, ids, masks):
            points = torch.rand(1, self.points, 2, device=score.device)
            found = at_points(score[:, None], points.expand(len(score), -1, -1))
            true = at_points(mask[:, None], points.expand(len(mask), -1, -1))
            # softplus(-x) inside the mask and softplus(x) outside, which differ by the logit x.
            bce = (F.softplus(found).sum(1)[:, None] - found @ true.T) / self.points
            shares = found.sigmoid()
            overlap = 2 * shares @ true.T
            sums = shares.sum(1)[:, None] + true.sum(1)
            dice = 1 - (overlap + 1) / (sums + 1)
            cost = self.mask_weight * bce + self.dice_weight * dice
            costs.append(cost - self.class_weight * probabilities[:, k])
        # One transfer for all images. Non-finite costs are the highest.
        flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(1e10, 1e10, -1e10).cpu()
        pairs, device = [], scores.device
        for cost in flat.split([cost.numel() for cost in costs]):
            rows, columns = linear_sum_assignment(cost.view(scores.shape[1], -1).numpy())
            pairs.append(
                (torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device))
            )
        return pairs

    def _uncertain_points(self, scores: Tensor) -> Tensor:
        """(N, points, 2) in [0, 1], for (N, 1, h, w) scores."""
        N, device = len(scores), scores.device
        points = torch.rand(N, 3 * self.points, 2, device=device)
        certain = at_points(scores, points).abs()
        count = 3 * self.points // 4
        nearest = certain.topk(count, dim=1, largest=False).indices
        chosen = points.gather(1, nearest[:, :, None].expand(-1, -1, 2))
        return torch.cat([chosen, torch.rand(N, self.points - count, 2, device=device)], dim=1)


def classes_there(label: Tensor, num_class: int) -> Tensor:
    """Classes that occur in each label of a batch, (B, num_class) bool."""
    there = torch.zeros(len(label), num_class + 1, dtype=torch.bool, device=label.device)
    return there.scatter_(1, label.clamp(min=-1).flatten(1) + 1, True)[:, 1:]


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """(N, 1, h, w) maps at (N, P, 2) points (x, y) in [0, 1], bilinear: (N, P)."""
    found = F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)
    return found[:, 0, :, 0]


def _dice(shares: Tensor, true: Tensor) -> Tensor:
    """1 - Dice coefficient of (N, P) masks, smoothed with 1: (N,)."""
    return 1 - (2 * (shares * true).sum(1) + 1) / (shares.sum(1) + true.sum(1) + 1)
