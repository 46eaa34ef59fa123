"""How far two computations of the same numbers may be apart."""

import torch


def rounding(x, layers):
    """What rounding does at most to values like `x` that came through so many layers.

    Every layer rounds sums of terms as large as its largest value, and different kernels add these
    terms in different orders.
    """
    return layers * torch.finfo(x.dtype).eps * float(x.detach().abs().max())
