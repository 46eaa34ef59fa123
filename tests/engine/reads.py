"""When the host waits for a device: counted on the CPU by operators, on a GPU by torch itself."""

import warnings
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mit_semseg.losses import functional


class Reads(TorchDispatchMode):
    """Counts the moments when the host would wait for a device.

    Attributes:
        found: the operator of each.
        before_backward: those that came while some parameter had no gradient.
    """

    # Operators whose result, or the size of it, the host has to know.
    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self, module):
        super().__init__()
        self.parameters = list(module.parameters())
        self.found = []
        self.before_backward = []

    def note(self, name):
        self.found.append(name)
        if any(parameter.grad is None for parameter in self.parameters):
            self.before_backward.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or name in self.WAITING:
            self.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_of(module, monkeypatch):
    """The reads within, while a module is trained; `tolist` is no operator, and watched apart."""
    tolist = Tensor.tolist
    with Reads(module) as reads, monkeypatch.context() as patch:

        def watched(self):
            reads.note("tolist")
            return tolist(self)

        patch.setattr(Tensor, "tolist", watched)
        # On the CPU alone losses look at their labels.
        patch.setattr(functional, "_check_label", lambda *args: None)
        yield reads


@contextmanager
def gpu_waits():
    """What torch says within whenever the host waits for a GPU."""
    found = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            output = [str(warning.message) for warning in caught]
            found += [text for text in output if "called a synchronizing" in text]
