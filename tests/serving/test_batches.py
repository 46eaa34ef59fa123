"""Which jobs share a forward pass."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest
from http_server import Brightness, wait_until

from mit_semseg.serving.batches import Batches, Job
from mit_semseg.serving.limits import Limits


def job(width=6, height=4, value=0, load=None):
    image = np.full((height, width, 3), value, np.uint8)
    return Job(
        (width, height), load or (lambda: image), lambda result: bytes([result.labels[0, 0]])
    )


@pytest.fixture
def model():
    return Brightness()


@pytest.fixture
def make(model):
    made = []

    def batches(**limits):
        made.append(Batches(model, Limits(**{"window": 0, **limits})))
        return made[-1]

    yield batches
    model.go.set()
    for one in made:
        one.close()


def while_busy(batches, model, jobs):
    """Submit jobs while the model computes another one; returns their futures."""
    model.go.clear()
    model.entered.clear()
    first = batches.submit(job(1, 1))
    assert model.entered.wait(10)
    futures = [batches.submit(one) for one in jobs]
    model.go.set()
    assert first.result(10) == b"\0"
    wait(futures, 10)
    model.batches.pop(0)
    return futures


def test_jobs_of_one_size_share_a_pass_and_get_their_own_answers(make, model):
    futures = while_busy(make(), model, [job(value=value) for value in (0, 255, 0, 255)])
    assert [future.result(10) for future in futures] == [b"\0", b"\1", b"\0", b"\1"]
    assert model.batches == [4]


def test_sizes_are_computed_apart_the_oldest_first(make, model):
    while_busy(make(), model, [job(6), job(8), job(6), job(8), job(9)])
    assert model.batches == [2, 2, 1]


def test_a_batch_is_limited(make, model):
    while_busy(make(batch=3), model, [job() for _ in range(7)])
    assert model.batches == [3, 3, 1]


def test_a_batch_is_limited_in_pixels(make, model):
    """Two of 24 pixels are below the limit, three above."""
    while_busy(make(megapixels=60 / 1e6), model, [job() for _ in range(5)])
    assert model.batches == [2, 2, 1]


def test_the_window_collects_what_comes_a_little_later(make, model):
    batches = make(window=20_000, batch=2)
    first = batches.submit(job())
    second = batches.submit(job())  # which fills the batch, so that nobody waits on
    wait([first, second], 10)
    assert model.batches == [2]


def test_a_job_that_is_cancelled_is_not_computed(make, model):
    batches = make()
    model.go.clear()
    batches.submit(job(1, 1))
    assert model.entered.wait(10)
    gone, stays = batches.submit(job()), batches.submit(job())
    assert gone.cancel()
    model.go.set()
    assert stays.result(10) == b"\0"
    assert model.batches == [1, 1]


def test_an_image_that_is_damaged_does_not_spoil_its_batch(make, model):
    def damaged():
        raise ValueError("damaged")

    bad, good = while_busy(make(), model, [job(load=damaged), job(value=255)])
    assert good.result(10) == b"\1"
    with pytest.raises(ValueError, match="damaged"):
        bad.result(10)


def test_after_an_error_of_the_model_others_are_computed(make, model, monkeypatch):
    batches = make()
    monkeypatch.setattr(batches, "_segment", fail)
    with pytest.raises(RuntimeError, match="could not be computed"):
        batches.submit(job()).result(10)
    monkeypatch.setattr(batches, "_segment", model)
    assert batches.submit(job()).result(10) == b"\0"


def fail(images):
    raise MemoryError("no memory")


def test_closing_computes_what_waits(model):
    batches = Batches(model, Limits(window=0))
    model.go.clear()
    futures = [batches.submit(job(width)) for width in (1, 2, 3)]
    closing = threading.Thread(target=batches.close)
    closing.start()
    wait_until(lambda: not batches.alive)
    with pytest.raises(RuntimeError, match="closed"):
        batches.submit(job())
    model.go.set()
    closing.join(10)
    assert [future.result(0) for future in futures] == 3 * [b"\0"]
