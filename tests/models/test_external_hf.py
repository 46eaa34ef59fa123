"""Models of transformers: equality with what transformers computes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from other_libraries import MASKS, NAMES, SEMANTIC, SIDE, saved_hf

from mit_semseg.config import DataOptions, ModelOptions, Options, TrainOptions
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.models import ModelBuilder
from mit_semseg.models.external import save_pretrained
from mit_semseg.models.external.hf_network import KINDS

pytest.importorskip("transformers")
CLOSE = 1e-4


class Pair:
    """A network of transformers, its folder, and the module built from that."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.theirs = saved_hf(kind, folder)
        self.ours = build(folder)
        self.task = {}
        if kind == "oneformer":
            from transformers import AutoTokenizer

            words = AutoTokenizer.from_pretrained(folder)(
                ["the task is semantic"] * 2, padding="max_length", max_length=77
            )
            self.task["task_inputs"] = torch.tensor(words["input_ids"])


def build(folder, num_class=5, **model):
    options = Options(
        MODEL=ModelOptions(arch=f"hf:{folder}", **model),
        DATASET=DataOptions(num_class=num_class),
        DIR=str(folder / "none"),
    )
    return ModelBuilder.from_config(options).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = Pair(kind, tmp_path_factory.mktemp("hf") / kind)
        return made[kind]

    return get


def images(count=2):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def labels(count=2):
    """Blocks of four classes, and some pixels without."""
    cells = torch.tensor([[[0, 1], [2, -1]], [[3, 3], [0, 1]], [[2, 2], [2, 1]]])[:count]
    return cells.repeat_interleave(SIDE // 2, 1).repeat_interleave(SIDE // 2, 2)


@pytest.mark.parametrize("kind", (*SEMANTIC, *MASKS))
def test_logits_and_state_dict_are_theirs(kind, pair, tmp_path):
    it = pair(kind)
    with torch.no_grad():
        found, ours = it.theirs(images(), **it.task), it.ours.logits(images())
    if kind in SEMANTIC:
        ours = F.interpolate(ours, size=found.logits.shape[2:], mode="bilinear")
        assert torch.allclose(ours, found.logits, rtol=0, atol=CLOSE * float(ours.std()))
        expected = found.logits.argmax(1)
    else:
        classes = found.class_queries_logits.softmax(-1)[..., :-1]
        expected = torch.einsum("bqc,bqhw->bchw", classes, found.masks_queries_logits.sigmoid())
        assert torch.allclose(ours.exp(), expected, rtol=CLOSE, atol=1e-30)
        expected = expected.argmax(1)
    assert torch.equal(ours.argmax(1), expected)
    assert len(expected.unique()) > 1

    save_pretrained(it.ours.encoder, it.ours.decoder, tmp_path, names=NAMES)
    back = type(it.theirs).from_pretrained(tmp_path)
    assert back.config.id2label == dict(enumerate(NAMES))
    ours, theirs = back.state_dict(), it.theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # OneFormer has one in float64
        assert torch.equal(ours[name].float(), value.float()), name


@pytest.mark.parametrize("kind", ["segformer", "maskformer"])
def test_label_maps_are_those_of_their_post_processing(kind, pair):
    import transformers

    it = pair(kind)
    name = {"segformer": "SegformerImageProcessor", "maskformer": "MaskFormerImageProcessor"}[kind]
    processor = getattr(transformers, name)()
    with torch.no_grad():
        found = it.theirs(images())
        probabilities = it.ours({"img_data": images()}, segSize=(SIDE // 4, SIDE // 4))
    sizes = [(SIDE // 4, SIDE // 4)] * 2  # where mask logits, and scores, are computed
    theirs = processor.post_process_semantic_segmentation(found, target_sizes=sizes)
    assert torch.equal(probabilities.argmax(1), torch.stack(theirs))


def test_masks_are_summed_as_by_mask2formers_post_processing(pair):
    """Which resizes mask logits to 384 x 384 first: here they are of that size already."""
    from transformers import Mask2FormerImageProcessor

    it = pair("mask2former")
    generator = torch.Generator().manual_seed(2)
    found = SimpleNamespace(
        class_queries_logits=torch.randn(1, 6, 6, generator=generator),
        masks_queries_logits=torch.randn(1, 6, 384, 384, generator=generator),
    )
    scores = it.ours.decoder.class_scores(found.class_queries_logits, found.masks_queries_logits)
    processor = Mask2FormerImageProcessor()
    expected = processor.post_process_semantic_segmentation(found)[0]
    assert torch.equal(scores.argmax(1)[0], expected)


@contextmanager
def training(pair):
    """Both networks in training mode, then with their earlier state."""
    modules = pair.ours, pair.theirs
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    for module in modules:
        module.train()
    yield
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
        module.eval().zero_grad()


@pytest.mark.parametrize("kind", SEMANTIC)
def test_semantic_loss_is_theirs(kind, pair):
    it = pair(kind)
    label = labels()
    with training(it):
        ours, _ = it.ours({"img_data": images(), "seg_label": label})
        theirs = it.theirs(images(), labels=label.where(label >= 0, 255)).loss
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=CLOSE)


@pytest.mark.parametrize("kind", MASKS)
def test_mask_loss_is_theirs(kind, pair):
    it = pair(kind)
    label = labels()
    ids = [one.unique()[one.unique() >= 0] for one in label]
    masks = [(one == k[:, None, None]).float() for one, k in zip(label, ids)]
    with training(it):
        torch.manual_seed(3)
        ours, _ = it.ours({"img_data": images(), "seg_label": label})
        torch.manual_seed(3)  # for the points that losses are taken at
        theirs = it.theirs(images(), mask_labels=masks, class_labels=ids, **it.task).loss
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=CLOSE)


def same_points(*size, device=None):
    sides = tuple(size[0] if isinstance(size[0], tuple) else size)
    one = torch.empty(sides[1:]).uniform_(generator=torch.Generator().manual_seed(5))
    return one.expand(sides).contiguous()


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["segformer", "upernet", "mask2former", "eomt"])
def test_replicas_learn_the_loss_of_the_union(kind, pair, monkeypatch):
    # The same points for every mask, whatever else is in the batch.
    monkeypatch.setattr(torch, "rand", same_points)
    it = pair(kind)
    whole = {"img_data": images(3), "seg_label": labels(3)}
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    with training(it):
        losses, accuracies = UserScatteredDataParallel(it.ours, device_ids=["cpu"] * 2)(parts)
        expected = gradients(it.ours, losses.mean())
        loss, accuracy = it.ours(whole)
        found = gradients(it.ours, loss)
    assert float(losses.mean().detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(accuracies.mean()) == pytest.approx(float(accuracy), rel=1e-5)
    largest = max(float(x.abs().max()) for x in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * largest), name


@pytest.mark.parametrize("kind", ["upernet", "mask2former", "eomt"])
def test_threads_may_share_a_network(kind, pair):
    """As evaluation on a CPU does: here both have their features before either goes on."""
    module = pair(kind).ours
    names = list(module.state_dict())
    replaced = module.decoder.net.get_submodule(KINDS[kind].path or "embeddings")

    @torch.no_grad()
    def logits(image):
        return module.logits(image[None])

    expected = [logits(image) for image in images()]
    meeting = threading.Barrier(2, timeout=20)
    handle = replaced.register_forward_pre_hook(lambda *args: None if meeting.wait() else None)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(logits, images()))
    handle.remove()
    assert all(map(torch.equal, found, expected))
    assert list(module.state_dict()) == names


def test_an_image_without_labels_teaches_nothing_of_masks(pair):
    it = pair("mask2former")
    with training(it):
        loss, accuracy = it.ours({"img_data": images(), "seg_label": torch.full_like(labels(), -1)})
        loss.backward()
    assert torch.isfinite(loss) and float(accuracy) == 0


@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_other_classes_give_a_new_head_and_say_so(kind, pair, caplog):
    module = build(pair(kind).folder, num_class=7)
    assert "skipped, another number of classes" in caplog.text
    assert module.logits(images()).shape[1] == 7
    theirs = pair(kind).ours.encoder.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in module.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("segformer", "net.decode_head.classifier.weight"),
        ("maskformer", "net.class_predictor.weight"),
    ],
)
def test_classes_of_equal_names_go_on(kind, tensor, pair):
    it = pair(kind)
    options = Options(MODEL=ModelOptions(arch=f"hf:{it.folder}"), DATASET=DataOptions(num_class=3))
    module = ModelBuilder.from_config(options, classes=("lamp", "sofa", "wall"))
    ours, theirs = (x.decoder.state_dict()[tensor] for x in (module, it.ours))
    assert torch.equal(ours[[0, 2]], theirs[[2, 0]])  # NAMES
    assert torch.equal(ours[3:], theirs[5:])  # no object, where it is scored


def test_images_of_other_sizes_are_refused(pair):
    with pytest.raises(ValueError, match=r"multiples of 32.*set DATASET.padding_constant 32"):
        pair("segformer").ours.logits(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match=r"64 x 64 only.*DATASET.crop_size \[64, 64\]"):
        pair("eomt").ours.logits(torch.zeros(1, 3, 64, 96))


def test_a_loss_that_is_not_taken_is_named(pair, caplog):
    options = Options(
        MODEL=ModelOptions(arch=f"hf:{pair('maskformer').folder}"),
        DATASET=DataOptions(num_class=5),
        TRAIN=TrainOptions(loss="focal"),
    )
    ModelBuilder.from_config(options)
    assert "TRAIN.loss has no effect: hf:" in caplog.text


def test_random_weights_on_request(pair):
    it = pair("segformer")
    module = build(it.folder, weights_encoder="none", weights_decoder="none")
    weight = next(iter(module.encoder.parameters()))
    assert not torch.equal(weight, next(iter(it.ours.encoder.parameters())))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("hf:", "it is hf:NAME or smp:NAME"),
        ("timm:resnet50", "it is hf:NAME or smp:NAME"),
        ("hf:no such folder", "no such folder, and no name on huggingface.co"),
    ],
)
def test_wrong_names_are_refused(arch, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ModelBuilder.from_config(Options(MODEL=ModelOptions(arch=arch)))


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert; models that can be used are segformer"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("model.safetensors", b'{"', b"\x10", "SafetensorError"),
        ("config.json", b'"decoder_hidden_size": 16', b'"decoder_hidden_size": 32', "RuntimeError"),
        ("config.json", b'"0": "wall"', b'"9": "wall"', "KeyError"),
        ("config.json", b'"depths": [', b'"depths": "1", "_": [', ""),
        ("preprocessor_config.json", b"[0.5, 0.5, 0.5]", b'"grey"', "ValueError"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(file, old, new, reason, tmp_path):
    saved_hf("segformer", tmp_path, image_mean=[0.5] * 3, image_std=[1.0] * 3)
    content = (tmp_path / file).read_bytes()
    assert old in content
    (tmp_path / file).write_bytes(content.replace(old, new, 1))
    with pytest.raises(OSError, match=f"'hf:{tmp_path}' cannot be read.*{reason}") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cannot be downloaded .* give a folder") as caught:
        build(Path("nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mit_semseg\[hf\]'"):
        build(Path("nobody/nothing"))
