"""docs/models.md is what the code says: its tables, and where models differ from their authors'.

Run as a script, this writes both anew.
"""

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from every_model import every_model
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.models import DECODERS, ENCODERS
from mit_semseg.models.decoders import Decoder
from mit_semseg.models.encoders import Encoder
from mit_semseg.models.encoders.base import Variant
from mit_semseg.models.encoders.timm_backbone import TimmEncoder
from mit_semseg.models.encoders.vit_pyramid import SimplePyramid
from mit_semseg.models.papers import PAPER_MODELS
from mit_semseg.tools.overfit import TARGET
from mit_semseg.weights import TORCHVISION, TorchvisionSource, imagenet_weights

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
SIDE, CLASSES = 512, (11, 21)
BESIDE = "resnet50dilated"  # the encoder of decoders that no model below has
OPERATIONS = "GFLOP"  # columns of this name take minutes to compute

# Sizes in MiB of float32 as they are known from elsewhere.
KNOWN = {
    ("unet_bilinear", "unet_bilinear"): (51, 51),
    ("vgg16_bn_indices", "segnet"): (112, 117),
    ("resnet18", "linknet"): (44, 44),
    ("fcdensenet103", "fcdensenet103"): (35.6, 35.6),
    ("enet", "enet"): (1.34, 1.34),
    ("drn_c_26", "c1"): (78.7, 78.7),
    ("resnet50_dilated16", "deeplabv3plus"): (154, 154),
    ("resnet101_dilated16", "deeplabv3plus"): (226, 226),
}


# ------------------------------------------------------------------------------------ measuring
@cache
def encoder(name):
    with torch.device("meta"):
        return ENCODERS.get(name)().eval()


def decoder(name, arch_encoder, num_class):
    kind = ENCODERS.get(arch_encoder)
    with torch.device("meta"):
        built = DECODERS.get(name)(kind.channels, num_class=num_class, strides=kind.strides)
    return built.eval()


def mib(*parts):
    """Parameters in float32, auxiliary heads among them."""
    return sum(4 * p.numel() for part in parts for p in part.parameters()) / 2**20


@cache
@torch.no_grad()
def maps(name):
    """What an encoder gives for an image, and its operations in 1e9."""
    with FlopCounterMode(display=False) as counter:
        features = encoder(name)(torch.zeros(1, 3, SIDE, SIDE, device="meta"), True)
    return features, counter.get_total_flops() / 1e9


@torch.no_grad()
def decoder_operations(name, arch_encoder):
    built = decoder(name, arch_encoder, CLASSES[-1])
    with FlopCounterMode(display=False) as counter:
        built.logits(maps(arch_encoder)[0])
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------------------------- the columns
def class_of(registry, name):
    entry = registry.get(name)
    return entry.kind if isinstance(entry, Variant) else entry


def paper(kind):
    """The first paper that a class, or what it is made from, names."""
    for base in kind.__mro__:
        text = " ".join((base.__doc__ or "").split())
        if base.__module__.startswith("mit_semseg.") and (
            found := re.search(r"Paper: (.+?\d{4})(?:, arXiv:(\d{4}\.\d{4,5}))?", text)
        ):
            who, number = found.groups()
            return f"[{who}](https://arxiv.org/abs/{number})" if number else who
    return "–"


def code(names):
    return ", ".join(f"`{name}`" for name in names)


def figure(value):
    """Three digits, or all before the point."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def size(value):
    """A digit after the point, two of what is small."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def families():
    """Encoders that differ in dilation alone, by the plain name, which comes first."""
    longest_first = sorted(ENCODERS.names(), key=len, reverse=True)
    shortest = {ENCODERS.get(name): name for name in longest_first}
    found = {}
    for name in sorted(shortest.values(), key=lambda name: -ENCODERS.get(name).strides[-1]):
        options = {**getattr(ENCODERS.get(name), "options", {}), "output_stride": None}
        found.setdefault((class_of(ENCODERS, name), str(options)), []).append(name)
    return dict(sorted((names[0], names) for names in found.values()))


def weights(name):
    """What `MODEL.weights_encoder ""` loads."""
    if name in ("bisenet_resnet18", "icnet_resnet50"):
        return f"those of `{name.split('_')[1]}`"
    try:
        source = imagenet_weights(name)
    except ValueError:
        return "–"
    if not isinstance(source, TorchvisionSource):
        return "published"
    return code([f"torchvision:{n}" for n, known in TORCHVISION.items() if known is source])


def heads(kind):
    words = []
    for head in kind.auxiliary:
        weight = "`TRAIN.deep_sup_scale`" if head.weight is None else f"{head.weight:g}"
        words.append(f"{weight} (`losses.{head.loss.__name__}`)" if head.loss else weight)
    return ", ".join(words) or "–"


# ----------------------------------------------------------------------------------- the tables
Row = dict[str, str]


def encoder_rows(count):
    for plain, names in families().items():
        kinds = [ENCODERS.get(name) for name in names]
        yield {
            "encoder": code(names),
            "channels": ", ".join(map(str, kinds[0].channels)),
            "strides": ", ".join(map(str, kinds[0].strides)),
            "output stride": ", ".join(str(kind.strides[-1]) for kind in kinds),
            "MiB": size(mib(encoder(plain))),
            OPERATIONS: ", ".join(figure(maps(name)[1]) for name in names) if count else "",
            "ImageNet weights": weights(plain),
            "paper": paper(class_of(ENCODERS, plain)),
        }


def decoder_rows(count):
    aliases = {}
    for name in sorted(DECODERS.names(), key=len):
        aliases.setdefault(DECODERS.get(name), []).append(name)
    for kind, (name, *others) in sorted(aliases.items(), key=lambda pair: pair[1]):
        beside = next((m.encoder for m in PAPER_MODELS if m.decoder in (name, *others)), BESIDE)
        yield {
            "decoder": code([name]) + (f" ({code(others)})" if others else ""),
            "min maps": str(kind.min_feature_maps),
            "encoders": code(kind.supported_encoders) or "any",
            "auxiliary heads": heads(kind),
            "measured on": f"`{beside}`",
            "MiB": size(mib(decoder(name, beside, CLASSES[-1]))),
            OPERATIONS: figure(decoder_operations(name, beside)) if count else "",
            "paper": paper(kind),
        }


def model_rows(count):
    for name, enc, dec in PAPER_MODELS:
        known = KNOWN.get((enc, dec))
        operations = maps(enc)[1] + decoder_operations(dec, enc) if count else 0
        sizes = {n: mib(encoder(enc), decoder(dec, enc, n)) for n in CLASSES}
        yield {
            "model": name,
            "`MODEL.arch_encoder`": f"`{enc}`",
            "`MODEL.arch_decoder`": f"`{dec}`",
            **{f"MiB, {n} classes": size(x) for n, x in sizes.items()},
            "expected": " to ".join(f"{x:g}" for x in sorted(set(known))) if known else "–",
            OPERATIONS: figure(operations) if count else "",
        }


def weight_rows(count):
    for name, source in TORCHVISION.items():
        yield {
            "name": f"`torchvision:{name}`",
            "encoder": f"`{source.encoder}`",
            "decoders": code(source.decoders) or "–",
            "trained on": "COCO, 21 classes of VOC" if source.segments else "ImageNet",
        }


TABLES = {
    "models": model_rows,
    "encoders": encoder_rows,
    "decoders": decoder_rows,
    "torchvision": weight_rows,
}


# ------------------------------------------------------------------------------ the deviations
SECTION = re.compile(r"^Deviations:\n((?:    .*\n?|\n)+)", re.MULTILINE)


def deviations(kind):
    """The items below `Deviations:` in the docstring of a class, not of those it is made from."""
    found = SECTION.search(inspect.cleandoc(kind.__dict__.get("__doc__") or ""))
    items = re.split(r"^    - ", found[1], flags=re.MULTILINE)[1:] if found else []
    return [" ".join(item.split()) for item in items]


def named(registry, kind):
    """The registered names that a class stands for; of one network at several strides the plain."""
    groups = families() if registry is ENCODERS else {n: [n] for n in registry.first_names()}
    found = []
    for plain, names in groups.items():
        own = [name for name in names if issubclass(class_of(registry, name), kind)]
        found += [plain] if own == names else own
    return found


def every_deviation():
    """Heading -> items: what all encoders or decoders have in common first, then by name."""
    found = {}
    for registry, base in ((ENCODERS, Encoder), (DECODERS, Decoder)):
        kinds = {k for name in registry.names() for k in class_of(registry, name).__mro__}
        kinds = {kind for kind in kinds if deviations(kind)} - {base}
        found[f"Every {registry.kind}"] = deviations(base)
        for kind in sorted(kinds, key=lambda kind: (named(registry, kind), kind.__name__)):
            names = named(registry, kind)
            heading = registry.kind.capitalize() + ("s" if len(names) > 1 else "")
            found[f"{heading} {code(names)}"] = deviations(kind)
        if registry is ENCODERS:
            found["Encoders `timm:NAME`"] = deviations(TimmEncoder)
            found["`MODEL.vit_pyramid`"] = deviations(SimplePyramid)
    return found


def deviations_written():
    blocks = (
        f"**{heading}**\n\n" + "\n".join(f"- {item}" for item in items)
        for heading, items in every_deviation().items()
    )
    return "\n\n".join(blocks)


def markdown(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(table):
    """What stands in the page between the marks of a table or of the deviations."""
    return re.compile(rf"(?<=<!-- {table} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


def written(table, count):
    found = between(table).search(PAGE.read_text("utf-8"))
    assert found, f"{PAGE.name} has no table {table}"
    head, _, *lines = (line.strip("| ").split(" | ") for line in found[0].splitlines())
    rows = [dict(zip(head, cells, strict=True)) for cells in lines]
    return [{k: v if count or k != OPERATIONS else "" for k, v in row.items()} for row in rows]


# ------------------------------------------------------------------------------------ the tests
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_what_the_code_says(table):
    assert written(table, count=False) == list(TABLES[table](False))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_operations_are_those_of_the_code(table):
    assert written(table, count=True) == list(TABLES[table](True))


def test_deviations_are_those_of_the_docstrings():
    found = between("deviations").search(PAGE.read_text("utf-8"))
    assert found and found[0] == deviations_written()


def test_no_docstring_hides_a_deviation():
    """Each is an item of a section that the page is made from."""
    sections, loose = [], []
    for folder in ("encoders", "decoders"):
        for file in sorted((ROOT / "mit_semseg" / "models" / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                    continue
                text = ast.get_docstring(node) or ""
                sections += SECTION.findall(text)
                if re.search(r"deviat|differs? from|unlike in", SECTION.sub("", text), re.I):
                    loose.append(f"{file.name}: {getattr(node, 'name', 'module')}")
    assert loose == []
    assert len(sections) == len(every_deviation())


@pytest.mark.parametrize("registry", [ENCODERS, DECODERS], ids=["encoders", "decoders"])
def test_every_docstring_names_a_paper(registry):
    kinds = {class_of(registry, name) for name in registry.names()}
    # C1 is the published toolkit's own.
    assert [kind.__name__ for kind in kinds if paper(kind) == "–"] in ([], ["C1"])


@pytest.mark.parametrize(
    ("enc", "dec", "known"),
    [(*pair, known) for pair, known in KNOWN.items()],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("num_class", CLASSES)
def test_sizes_are_within_five_percent(enc, dec, known, num_class):
    assert 0.95 * known[0] <= mib(encoder(enc), decoder(dec, enc, num_class)) <= 1.05 * known[1]


def rewrite():
    text = PAGE.read_text("utf-8")
    for table, rows in TABLES.items():
        text = between(table).sub(lambda _: markdown(list(rows(True))), text)  # noqa: B023
    text = between("deviations").sub(lambda _: deviations_written(), text)
    PAGE.write_text(text, "utf-8")


def test_every_model_has_learned_one_image():
    """docs/overfit is of the models there are; `make overfit` writes it anew."""
    text = (PAGE.parent / "overfit" / "overfit.md").read_text("utf-8")
    rows = re.findall(r"^\| (\w+) \+ (\w+) \| ([\d.]+) % \|", text, re.MULTILINE)
    assert [(encoder, decoder) for encoder, decoder, _ in rows] == every_model()
    assert all(float(accuracy) >= 100 * TARGET for *_, accuracy in rows)


if __name__ == "__main__":
    rewrite()
