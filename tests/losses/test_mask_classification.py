"""The loss of matched masks, against transformers' and by hand."""

import pytest
import torch

from mit_semseg.losses.mask_classification import MaskClassificationLoss, classes_there

CLASSES, QUERIES = 5, 9


def batch(seed=0):
    """Predictions of two layers; labels with ignored pixels, of which the last has one class."""
    torch.manual_seed(seed)
    layers = [(torch.randn(3, QUERIES, CLASSES + 1), torch.randn(3, QUERIES, 6, 7)) for _ in "ab"]
    label = torch.randint(-1, CLASSES, (3, 4, 5)).repeat_interleave(6, 1).repeat_interleave(5, 2)
    label[2] = label[2].clamp(max=0)
    return layers, label


def test_equals_transformers():
    eomt = pytest.importorskip("transformers.models.eomt", reason="transformers is not installed")
    modeling = pytest.importorskip("transformers.models.eomt.modeling_eomt")
    config = eomt.EomtConfig(num_labels=CLASSES, train_num_points=500, hidden_size=12)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    theirs = modeling.EomtLoss(config, weights)
    layers, label = batch()
    there = classes_there(label, CLASSES)
    ids = [row.nonzero()[:, 0] for row in there]
    masks = [(one == k[:, None, None]).float() for one, k in zip(label, ids)]
    ours = MaskClassificationLoss(points=500)
    torch.manual_seed(3)
    given = ours(layers, label)
    torch.manual_seed(3)
    expected = torch.zeros(2)
    for classes, scores in layers:
        losses = theirs(scores, classes, masks, ids)
        expected[0] += 2 * losses["loss_cross_entropy"]
        expected[1] += 5 * (losses["loss_mask"] + losses["loss_dice"])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_means_over_parts_weighted_by_counts_are_that_over_the_whole():
    layers, label = batch()
    loss = MaskClassificationLoss()
    # Classes only: masks are compared at random points.
    whole = loss(layers, label)[0]
    parts = [
        ([(c[i : i + 1], s[i : i + 1]) for c, s in layers], label[i : i + 1]) for i in range(3)
    ]
    counts = torch.stack([loss.counts(one, CLASSES, QUERIES) for _, one in parts])
    torch.testing.assert_close(counts.sum(0), loss.counts(label, CLASSES, QUERIES))
    means = torch.stack([loss(*part)[0] for part in parts])
    joined = (means * counts[:, 0]).sum() / counts[:, 0].sum()
    torch.testing.assert_close(joined, whole)
    shown = sum(len(set(one.unique().tolist()) - {-1}) for one in label)
    assert counts[:, 1].sum() == shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_masks_cost_little(dtype):
    label = torch.arange(3)[:, None, None].expand(3, 8, 10)
    classes = torch.full((3, QUERIES, CLASSES + 1), -50.0, dtype=dtype)
    classes[..., -1] = 50
    scores = torch.full((3, QUERIES, 4, 5), -50.0, dtype=dtype)
    for image in range(3):
        classes[image, 2 * image, [image, -1]] = torch.tensor([50.0, -50.0], dtype=dtype)
        scores[image, 2 * image] = 50
    given = MaskClassificationLoss()([(classes, scores)], label)
    # Most points lie on the edges of the image, where both masks fade to 0.
    assert given.dtype == torch.float32 and given[0] < 1e-6 and given[1] < 30
    wrong = MaskClassificationLoss()([(classes.roll(1, -1), -scores)], label)
    assert wrong[0] > 50 and wrong[1] > 0.9 * given[1]


def test_gradients_and_images_without_labels():
    layers, label = batch()
    layers = [(c.requires_grad_(), s.requires_grad_()) for c, s in layers]
    MaskClassificationLoss()(layers, label).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for pair in layers for x in pair)
    empty = torch.full_like(label, -1)
    given = MaskClassificationLoss()(layers, empty)
    assert given.isfinite().all() and given[1] == 0
    given.sum().backward()
