"""SUN RGB-D: 37 classes of indoor scenes, from four kinds of depth cameras.

Paper: Song et al. 2015, "SUN RGB-D: A RGB-D Scene Understanding Benchmark Suite". Licence: its page
states none but asks to cite the paper; some images are from NYU Depth v2, Berkeley B3DO and SUN3D,
with their own terms.

The original labels are in one MATLAB file (`SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat`), which needs
much memory. This format reads the same labels from PNG files, with the official split as two lists:
github.com/ankurhanda/sunrgbd-meta-data (Handa et al. 2016, arXiv:1511.07041).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, not_here
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import DEPTH_FOLDERS, Record, only_image

_META = "https://github.com/ankurhanda/sunrgbd-meta-data/raw/master"
# List of each split, and number of its first label file; test images are numbered first.
_SPLITS = {
    "train": ("sunrgbd_training_images.txt", 5051),
    "val": ("sunrgbd_testing_images.txt", 1),
    "test": ("sunrgbd_testing_images.txt", 1),
}
_PLACES = ("", "sunrgbd-meta-data/", "sunrgbd-meta-data-master/")
_LABELS = "sunrgbd_train_test_labels"


@FORMATS.register("sunrgbd")
class SunRgbd(DataFormat):
    """Frames in `SUNRGBD/{kv1,kv2,realsense,xtion}`, and lists and labels; stored 0 is void.

    A frame is a folder with an `image`, a `depth`, and a `depth_bfx` with filled holes, which is
    preferred. Depth is stored as 16-bit millimetres with rotated bits (see `images.load_depth`),
    and is used with `DATASET.depth`.
    """

    title = "SUN RGB-D"
    table = "sunrgbd"
    source = Source(
        title="SUN RGB-D (6.4 GB)",
        licence="see the pages of the data set, and of NYU Depth v2, B3DO, SUN3D for theirs",
        home="http://rgbd.cs.princeton.edu/",
        layout="SUNRGBD/{kv1,kv2,realsense,xtion}/, sunrgbd_{training,testing}_images.txt, "
        f"{_LABELS}/img-000001.png ...",
        folder="sunrgbd",
        archives=(
            Archive(("http://rgbd.cs.princeton.edu/data/SUNRGBD.zip",)),
            Archive((f"{_META}/{_LABELS}.tar.gz",), into=_LABELS),
            Archive(
                ("https://github.com/ankurhanda/sunrgbd-meta-data/archive/refs/heads/master.zip",),
                member="sunrgbd-meta-data-master",
            ),
        ),
    )
    num_class = 37
    depth_scale = "sunrgbd"

    def records(self, root: Path, split: str) -> list[Record]:
        if split not in _SPLITS:
            raise ValueError(f"SUN RGB-D has the splits {', '.join(_SPLITS)}, not {split!r}")
        listing, first = _SPLITS[split]
        base = _first(root, _PLACES, listing)
        labels = _labels(root, base)
        # Paths in the lists start with SUNRGBD/, which may be the root itself.
        inside = (root / "SUNRGBD").is_dir()
        records = []
        names = (root / base / listing).read_text(encoding="utf-8").split()
        for number, name in enumerate(names, first):
            image = name if inside else name.removeprefix("SUNRGBD/")
            records.append(Record(fpath_img=image, fpath_segm=f"{labels}/img-{number:06d}.png"))
        return records

    def records_for(self, root: Path, split: str, options: DataOptions) -> list[Record]:
        records = self.records(root, split)
        if options.depth:
            for record in records:
                record["fpath_depth"] = _depth(root, record["fpath_img"])
        return records

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.shifted(options.num_class, label_offset=1)


def _first(root: Path, places: Sequence[str], name: str) -> str:
    """The first of `places` below `root` that contains a file or folder of this name."""
    for place in places:
        if (root / place / name).exists():
            return place
    raise not_here(root, "SUN RGB-D", f"{places[0]}{name}", "sunrgbd")


def _labels(root: Path, base: str) -> str:
    """The folder of `img-000001.png` ..., below `root`."""
    places = [f"{base}{_LABELS}/", f"{base}{_LABELS}/{_LABELS}/", f"{_LABELS}/", base]
    for place in places:
        if (root / place).is_dir() and next((root / place).glob("img-*.png"), None):
            return (place or ".").rstrip("/")
    raise FileNotFoundError(
        f"{root}: SUN RGB-D without labels, expected {places[0]}img-000001.png; unpack "
        f"{_META}/{_LABELS}.tar.gz there"
    )


def _depth(root: Path, image: str) -> str:
    """Depth file of a frame, relative to `root`.

    Raises:
        FileNotFoundError: the frame has none.
    """
    frame = Path(image).parent.parent
    for folder in DEPTH_FOLDERS:
        only = only_image(root / frame / folder)
        if only is not None:
            return (frame / folder / only.name).as_posix()
    raise FileNotFoundError(
        f"{root / frame}: no depth, expected one image in {' or '.join(DEPTH_FOLDERS)}; unpack "
        "all of SUNRGBD.zip, or set DATASET.depth False and MODEL.in_channels 3"
    )
