"""Fully sharded training, `TRAIN.parallel fsdp`, with torch's FSDP2.

Every rank holds a share of each parameter, of its gradient, of its average and of its momentum. The
parameters of a block are gathered when the block is computed, and freed after it.

In bf16, parameters are gathered in float32 and cast by autocast, as in other trainings, and not
by torch's `MixedPrecisionPolicy`: torch's BatchNorm refuses weights in bf16 beside statistics in
float32, and on the CPU LayerNorm refuses them for inputs in float32.

Papers: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, sec. 5; Zhao et al. 2023 (FSDP),
arXiv:2304.11277.
"""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mit_semseg.errors import one_line
from mit_semseg.models import SegmentationModule
from mit_semseg.models.activation_checkpointing import blocks_of
from mit_semseg.models.lora import merged_state

T = TypeVar("T")

# Entry of a state with the size and CRC-32 of each file in its folder of shards.
SHARDS = "shards"
_INDEX = ".metadata"  # of torch.distributed.checkpoint, a pickle
# What it contains.
_IN_INDEX = {
    "torch": ("Size", "float32", "float64"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
}
# Exceptions for shards that are missing or damaged.
_BROKEN = (OSError, EOFError, pickle.UnpicklingError, AttributeError, LookupError, TypeError)


def check_torch() -> None:
    """Checks that this torch can train sharded.

    Raises:
        ValueError: it is too old: gloo then adds gradients instead of averaging them
            (github.com/pytorch/pytorch/issues/162338).
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise ValueError(
            f"TRAIN.parallel fsdp needs torch 2.11 or newer and this is {torch.__version__}: "
            "update torch, or set TRAIN.parallel processes"
        )


class Sharding:
    """Divides the parameters of a network, or of several copies of it, among the ranks.

    Args:
        module: the network, on the CPU; the same on all ranks. Changed in place.
        device: of this rank.
    """

    def __init__(self, module: SegmentationModule, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.names = frozenset(dict(module.named_parameters(remove_duplicate=False)))
        self._without_weights = _with_parameters_on(module, "meta")
        self.shard(module)

    def shard(self, module: SegmentationModule) -> None:
        """Divide a copy of the network, in place: each block of its encoder, then the rest."""
        from torch.distributed.fsdp import fully_shard

        for part in (*blocks_of(module.encoder), module):
            fully_shard(part, mesh=self.mesh)

    def empty(self) -> SegmentationModule:
        """The whole network on the CPU, with uninitialised parameters."""
        return _with_parameters_on(self._without_weights, "cpu")

    def whole(self, module: nn.Module) -> SegmentationModule:
        """A whole copy, on the CPU, of a sharded one; every rank has to call this."""
        copied = self.empty()
        copied.load_state_dict(gathered(module.state_dict()), assign=True)
        return copied


def _with_parameters_on(module: SegmentationModule, device: str) -> SegmentationModule:
    """A deep copy with uninitialised parameters."""
    parameters: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, parameters)


# ------------------------------------------------------------------------------ tensors
def is_sharded(value: Any) -> bool:
    """Whether a tensor is divided among the ranks."""
    return hasattr(value, "full_tensor")  # of DTensor; without importing torch.distributed.tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, in the same memory; a whole tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shares, which every rank has to call; a whole one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(state: Mapping[str, Tensor], wanted: bool = True) -> dict[str, Tensor]:
    """A state dict with its sharded tensors gathered, one after the other, on the CPU.

    If it has such tensors, every rank has to call this.

    Args:
        state: with sharded tensors or not.
        wanted: whether this rank keeps the result; it is empty otherwise.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = whole(value).cpu() if is_sharded(value) else value
        if wanted:
            tensors[name] = tensor
    return tensors


def saved_states(
    module: SegmentationModule, wanted: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is saved of encoder and decoder: `gathered`, with adapters added to the weights."""
    encoder, decoder = merged_state(module.encoder), merged_state(module.decoder)
    return gathered(encoder, wanted), gathered(decoder, wanted)


def _map_tensors(value: T, change: Callable[[str, Tensor], Tensor], path: str = "") -> T:
    """A copy of nested dicts and lists, with `change(path, tensor)` for each tensor."""
    if isinstance(value, Tensor):
        return change(path, value)  # type: ignore[return-value]
    if not isinstance(value, (dict, list)):
        return value
    changed = copy.copy(value)  # with the versions in the state dict of a module
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        changed[key] = _map_tensors(item, change, f"{path}.{key}" if path else str(key))
    return changed


# ------------------------------------------------------------------------------ states
def shards_of(state: Path) -> Path:
    """The folder with the shards of a state file."""
    return state.with_suffix(".shards")


def save_shards(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the sharded tensors of a state; every rank writes its own shares.

    Args:
        state: of the run.
        folder: to write, on a disk that all ranks share.

    Returns:
        The state with tensors without memory in their place, and with the entry `SHARDS`. The
        shards are valid once it is written: those of an interrupted write belong to no state.

    Raises:
        OSError: a rank cannot write.
    """
    from torch.distributed import checkpoint

    shards: dict[str, Tensor] = {}

    def put_aside(path: str, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        shards[path] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = _map_tensors(state, put_aside)
    rank = dist.get_rank()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)
    with _errors(OSError, f"cannot write {folder}"):
        checkpoint.save(shards, storage_writer=checkpoint.FileSystemWriter(folder))
    own = {file.name: _checksum(file) for file in folder.glob(f"__{rank}_*.distcp")}
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, own)
    sums.append({_INDEX: _checksum(folder / _INDEX)})
    return {**rest, SHARDS: {name: value for part in sums for name, value in part.items()}}


def check_shards(file: Path, sums: Mapping[str, Any]) -> None:
    """Verify the files of a state's shards.

    Args:
        file: of the state.
        sums: its entry `SHARDS`.

    Raises:
        ValueError: a file is missing, damaged, or contains something else.
    """
    folder = shards_of(file)
    try:
        for name, expected in dict(sums).items():
            if _checksum(folder / Path(name).name) != expected:
                raise ValueError(f"{folder / name} is damaged (its checksum is wrong)")
        with (folder / _INDEX).open("rb") as index:
            _Index(index).load()
    except _BROKEN as error:
        raise ValueError(f"the shards of {file} cannot be read ({one_line(error, 120)})") from error


class _Index(pickle.Unpickler):
    """Refuses code in the index, which torch unpickles without looking."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _IN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{_INDEX} contains {module}.{name}")
        return super().find_class(module, name)


def _checksum(file: Path) -> list[int]:
    """Size and CRC-32."""
    size = crc = 0
    with file.open("rb") as content:
        while block := content.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def load_shards(state: dict[str, Any], file: Path, sharding: Sharding | None) -> dict[str, Any]:
    """A state whose tensors are sharded as those of this run; every rank has to call this.

    Args:
        state: of any run; the shards that it lacks are read from the folder.
        file: of the state.
        sharding: of this run; None: the tensors are whole.

    Raises:
        ValueError: the shards do not fit.
    """
    wanted: dict[str, Tensor] = {}

    def place(path: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            wanted[path] = tensor = _empty(tensor, sharding)
        elif sharding is not None and _belongs_to_parameter(path, tensor, sharding.names):
            tensor = _divided(tensor, sharding)
        return tensor

    placed = _map_tensors(state, place)
    if wanted:
        from torch.distributed import checkpoint

        if SHARDS not in state:  # with it, they have been verified
            raise ValueError(f"{file} has no checksums of its shards")
        with _errors(ValueError, f"cannot read {shards_of(file)}"):
            reader = checkpoint.FileSystemReader(shards_of(file))
            checkpoint.load(wanted, storage_reader=reader)
    return placed


def _belongs_to_parameter(path: str, tensor: Tensor, names: frozenset[str]) -> bool:
    """Whether a tensor of a state is a parameter, its average or its momentum."""
    moment = path.startswith("optimizer") and tensor.ndim > 0  # steps are scalars
    return moment or path.removeprefix("average.module.") in names


def _empty(tensor: Tensor, sharding: Sharding | None) -> Tensor:
    if sharding is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    from torch.distributed.tensor import Shard, empty

    mesh = sharding.mesh
    return empty(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)])


def _divided(tensor: Tensor, sharding: Sharding) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.to(sharding.mesh.device_type), sharding.mesh, [Shard(0)])


@contextmanager
def _errors(kind: type[Exception], what: str) -> Iterator[None]:
    """Converts errors of torch.distributed.checkpoint, and silences its warnings."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise kind(f"{what} (rank {rank}: {one_line(cause, 200)})") from error
