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


def test_boundary_nll_is_that_of_the_sure_pixels():
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    label = torch.randint(-1, 3, (2, 5, 6))
    sure = scores[:, 0] > torch.tensor(0.6).logit()
    wanted = F.cross_entropy(scores[:, 1:].movedim(1, -1)[sure], label[sure], ignore_index=-1)
    torch.testing.assert_close(boundary.boundary_nll(scores, label, 0.6), wanted)


@pytest.mark.parametrize("loss", [boundary.boundary_bce, boundary.boundary_nll])
def test_nothing_to_learn_is_zero_with_a_gradient(loss):
    scores = torch.randn(1, 1 if loss is boundary.boundary_bce else 4, 3, 4, requires_grad=True)
    value = loss(scores, torch.full((1, 6, 8), -1))
    value.backward()
    assert value.item() == 0 and not scores.grad.any()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"scores is \(2, 1\) and label \(2, 4, 4\)"):
        boundary.boundary_bce(torch.zeros(2, 1), torch.zeros(2, 4, 4, dtype=torch.long))
