"""What the ranks of a training send each other in one step: the table of docs/scaling.md.

`python tests/engine/communication.py` prints it; a test compares it with the page.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mit_semseg.config import load_config
from mit_semseg.models import ModelBuilder

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
# Bytes a second, in each direction, of one rank's share of the wire: 25 and 200 Gbit/s Ethernet
# or InfiniBand, and the NVLink of an A100.
WIRES = {"25 Gbit/s": 25e9 / 8, "200 Gbit/s": 200e9 / 8, "NVLink 300 GB/s": 300e9}


@dataclass(frozen=True)
class Traffic:
    """What one step of one recipe exchanges.

    Attributes:
        parameters: that are trained; float32 gradients of them are summed over the ranks.
        layers: of synchronised batch normalisation.
        channels: of all these layers together.
    """

    parameters: int
    layers: int
    channels: int

    def gradients_sent(self, ranks):
        """Bytes each rank sends for the sum of the gradients, in a ring."""
        return 2 * (ranks - 1) / ranks * 4 * self.parameters

    def statistics_sent(self, ranks):
        """Bytes each rank sends for batch normalisation, in rings.

        Forward each layer gathers mean, variance and count from all ranks, in float64;
        backward it sums two gradients a channel over them, in float32.
        """
        gathered = (ranks - 1) * 8 * (2 * self.channels + self.layers)
        summed = 2 * (ranks - 1) / ranks * 4 * 2 * self.channels
        return gathered + summed

    @property
    def exchanges(self):
        """Times in a step that a rank waits for all others, beside the sum of the gradients: twice
        for each layer of batch normalisation, once for the number of valid pixels, once for the
        figures."""
        return 2 * self.layers + 2


def traffic_of(module):
    """The traffic of training a module."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Traffic(parameters, len(norms), sum(norm.num_features for norm in norms))


def recipes():
    """The traffic of recipes on ADE20K with encoder and decoder by name, of that with weights in
    weights/, and of the demo."""
    names = ("ade20k-*.yaml", "camvid-mobilenetv2dilated-c1_deepsup.yaml", "demo.yaml")
    found = {}
    opts = ["MODEL.weights_encoder", "none", "MODEL.weights_decoder", "none"]
    for file in sorted(file for name in names for file in (ROOT / "config").glob(name)):
        if load_config(file).MODEL.arch:
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ModelBuilder.from_config(load_config(file, opts), inference=False)
        found[file.stem] = traffic_of(module)
    return found


def table():
    """The lines of the table."""
    titles = ["recipe", "parameters", "gradients", f"sent, {RANKS} ranks", *WIRES]
    titles += ["SyncBN layers", "SyncBN sent", "exchanges"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, traffic in recipes().items():
        sent = traffic.gradients_sent(RANKS)
        cells = [name, f"{traffic.parameters / 1e6:.2f} M", f"{4e-6 * traffic.parameters:.1f} MB"]
        cells += [f"{sent / 1e6:.1f} MB"]
        cells += [f"{1e3 * sent / wire:.1f} ms" for wire in WIRES.values()]
        cells += [str(traffic.layers), f"{traffic.statistics_sent(RANKS) / 1e6:.2f} MB"]
        cells += [str(traffic.exchanges)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
