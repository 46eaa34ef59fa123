"""Losses of boundaries and detail."""

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.losses import boundary


def test_boundaries_are_pixels_near_another_class():
    torch.manual_seed(0)
    label = torch.randint(-1, 3, (2, 5, 6)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    _, H, W = label.shape
    wanted = torch.zeros_like(label, dtype=torch.bool)
    for b in range(2):
        for y in range(H):
            for x in range(W):
                near = label[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                own = label[b, y, x]
                wanted[b, y, x] = bool(own >= 0 and ((near >= 0) & (near != own)).any())
    assert torch.equal(boundary.boundaries(label, radius=1), wanted)


def test_boundary_bce_by_hand():
    # One row: two pixels on either side of the boundary, one beyond, one ignored.
    label = torch.tensor([[[0, 0, 0, 1, 1, -1]]])
    p = torch.tensor([0.2, 0.8, 0.8, 0.8, 0.2, 0.5], dtype=torch.float64)
    good, bad = -torch.tensor(0.8).log().item(), -torch.tensor(0.2).log().item()
    # Four of five are boundary: these weigh 0.2, the other one 0.8.
    wanted = (0.8 * good + 0.2 * (3 * good + bad)) / 5
    loss = boundary.boundary_bce(torch.logit(p).view(1, 1, 1, 6), label)
    assert loss.item() == pytest.approx(wanted)


def test_boundary_nll_is_that_of_predicted_boundaries():
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    label = torch.randint(-1, 3, (2, 5, 6))
    sure = scores[:, 0] > torch.tensor(0.6).logit()
    wanted = F.cross_entropy(scores[:, 1:].movedim(1, -1)[sure], label[sure], ignore_index=-1)
    torch.testing.assert_close(boundary.boundary_nll(scores, label, 0.6), wanted)


def test_details_are_edges_at_one_of_three_scales():
    torch.manual_seed(0)
    label = torch.randint(-1, 3, (2, 4, 5)).repeat_interleave(5, 1).repeat_interleave(5, 2)
    _, H, W = label.shape

    def edge(b, y, x):
        near = label[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        own = label[b, y, x]
        return bool(own >= 0 and (own - near[near >= 0]).sum() > 0)

    wanted = torch.zeros_like(label, dtype=torch.bool)
    for b in range(2):
        for y in range(H):
            for x in range(W):
                total = 0.0  # of maps of every step-th pixel, resized to the nearest
                for weight, step in ((0.6, 1), (0.3, 2), (0.1, 4)):
                    h, w = -(-H // step), -(-W // step)
                    total += weight * edge(b, y * h // H * step, x * w // W * step)
                wanted[b, y, x] = total > 0.15 and label[b, y, x] >= 0
    assert torch.equal(boundary.details(label), wanted)
    assert 0 < wanted.sum() < (label >= 0).sum()


def test_detail_by_hand():
    # Pixels of class 1 have a positive Laplacian, where 0 is beside them; the last is ignored.
    label = torch.tensor([[[0, 0, 1, 1, 1, -1]]])
    assert boundary.details(label).int().tolist() == [[[0, 0, 1, 1, 0, 0]]]
    p = torch.tensor([0.2, 0.2, 0.8, 0.8, 0.2, 0.5], dtype=torch.float64)
    loss = boundary.detail(torch.logit(p).view(1, 1, 1, 6), label)
    dice = 1 - (2 * 1.6 + 1) / (2.2 + 2 + 1)
    assert loss.item() == pytest.approx(-torch.tensor(0.8).log().item() + dice)


@pytest.mark.parametrize("loss", [boundary.boundary_bce, boundary.boundary_nll, boundary.detail])
def test_without_labelled_pixels_the_loss_is_0_with_a_gradient(loss):
    scores = torch.randn(1, 4 if loss is boundary.boundary_nll else 1, 3, 4, requires_grad=True)
    value = loss(scores, torch.full((1, 6, 8), -1))
    value.backward()
    assert value.item() == 0 and not scores.grad.any()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"scores is \(2, 1\) and label \(2, 4, 4\)"):
        boundary.boundary_bce(torch.zeros(2, 1), torch.zeros(2, 4, 4, dtype=torch.long))
