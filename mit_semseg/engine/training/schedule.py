"""Learning rate schedules (`TRAIN.schedule`), as factors on the configured rates."""

from __future__ import annotations

import math

from mit_semseg.config.train import TrainOptions

# one_cycle: fraction of steps with a rising factor, and the first and the last factor.
RISE, FIRST, LAST = 0.3, 1 / 25, 1 / 25e4


def encoder_factor(options: TrainOptions, step: int, total: int) -> float:
    """Factor on the encoder's learning rate; 0 for the first `encoder_delay` steps.

    Paper: Kerssies et al. 2025 (EoMT), arXiv:2503.19108, appendix (two-stage warm-up).
    """
    if step < options.encoder_delay:
        return 0.0
    warmup = options.encoder_warmup_iters or options.warmup_iters
    return learning_rate_factor(options, step, total, options.encoder_delay, warmup)


def learning_rate_factor(
    options: TrainOptions, step: int, total: int, delay: int = 0, warmup: int | None = None
) -> float:
    """Factor on the configured learning rates at a step.

    Papers: poly, Chen et al. 2017 (DeepLab), arXiv:1606.00915, sec. 4.3; cosine, Loshchilov &
    Hutter 2017, arXiv:1608.03983, eq. 5, without restarts; one_cycle, Smith & Topin 2018,
    arXiv:1708.07120, with torch's defaults and cosine annealing, and constant momentum.

    Args:
        options: `schedule` with `lr_pow`, `milestones`, `gamma` and `warmup_iters`.
        step: number of completed steps, 0 to total - 1.
        total: steps of the whole run.
        delay: steps before the warm-up.
        warmup: steps of the warm-up; None: `warmup_iters`.
    """
    warmup = options.warmup_iters if warmup is None else warmup
    if options.schedule == "one_cycle":
        top = (warmup or RISE * total) - 1
        if step <= top:
            return _annealed(FIRST, 1.0, step / top if top > 0 else 1.0)
        return _annealed(1.0, LAST, (step - top) / max(total - 1 - top, 1))
    rise = min(1.0, (step + 1 - delay) / warmup) if warmup else 1.0
    if options.schedule == "poly":
        return rise * (1.0 - step / total) ** options.lr_pow
    if options.schedule == "cosine":
        return rise * _annealed(1.0, 0.0, step / total)
    # Epochs are equally long.
    epoch = step * options.num_epoch // total
    passed = sum(epoch >= milestone for milestone in options.milestones)
    return rise * options.gamma**passed


def _annealed(first: float, last: float, share: float) -> float:
    """Cosine annealing from `first`, at `share` 0, to `last`, at 1."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
