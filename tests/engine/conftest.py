"""What tests of the engine have in common."""

import pytest
import torch
from small_runs import SMALL

from mit_semseg.config import load_config
from mit_semseg.engine import cpu
from mit_semseg.engine.training import metrics_log
from mit_semseg.models import ENCODERS


@pytest.fixture(autouse=True)
def same_threads():
    """Compute with as many threads throughout: on a busy machine a run would take fewer, and round
    differently from the one it is compared with."""
    with pytest.MonkeyPatch.context() as patch:  # not the one that a test may undo
        patch.setattr(cpu, "_fixed_threads", torch.get_num_threads())
        yield


@pytest.fixture
def settings(tmp_path, make_images):
    """`settings(SECTION__key=value)` -> a training of four steps on four images of four classes.

    `name=...` is the folder below `tmp_path`. The curves are not drawn, which takes longer than
    such a training.
    """
    data = tmp_path / "data"
    make_images(data, [(48, 64)] * 4)

    def build(name="model", **changes):
        values = {
            "DIR": str(tmp_path / name),
            "DATASET__root_dataset": str(data),
            "DATASET__list_train": str(data / "val.odgt"),
            "DATASET__list_val": str(data / "val.odgt"),
            "DATASET__num_class": 4,
            "DATASET__label_offset": 0,  # masks hold 0..3
            "DATASET__imgSizes": [48],
            "DATASET__segm_downsampling_rate": 4,
            "DATASET__random_flip": False,
            "MODEL__arch_encoder": "small",
            "MODEL__arch_decoder": "c1",
            "MODEL__fc_dim": 16,
            "MODEL__weights_encoder": "none",
            "TRAIN__num_epoch": 2,
            "TRAIN__epoch_iters": 2,
            "TRAIN__batch_size_per_gpu": 2,
            "TRAIN__workers": 0,
            "TRAIN__eval_epochs": 0,
            "TRAIN__disp_iter": 1,
            **changes,
        }
        return load_config(None, [x for k, v in values.items() for x in (k.replace("__", "."), v)])

    with pytest.MonkeyPatch.context() as patch:
        for encoder, kind in SMALL.items():
            patch.setitem(ENCODERS._entries, encoder, kind)
        patch.setattr(metrics_log, "curves", lambda figures, file: None)
        yield build
