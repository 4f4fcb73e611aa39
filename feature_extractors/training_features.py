"""The raw patch features of the training samples, kept once: in memory as far as it goes, else in a mapped file."""

import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_extractors.config import BANKS
from utils.distributed import Group, shard_offset
from utils.errors import InputError
from utils.feature_store import to_storage
from utils.memory import MEMORY_FILE_SYSTEMS, file_system_of
from utils.records import PatchFeatures

logger = logging.getLogger(__name__)

# What is left of the memory budget is for the networks, the projected rows, the banks and the maps.
FEATURES_SHARE = 0.5
# Rows picked from a mapped file before its pages are let go of: each brings 64 KB with it.
CHOSEN_AT_ONCE = 512


class PatchRows:
    """Training patches (N, D), wherever they lie; read as float32, part by part.

    Args:
        stored: (M, D), in memory or mapped from a file.
        device: where the parts that are read come to lie.
        release: called after each part that was read; gives pages of a mapped file back.
        kept: (N,) indices of the rows that count, None for all.
    """

    def __init__(
        self,
        stored: Tensor,
        device: torch.device | None = None,
        release: Callable[[], None] = lambda: None,
        kept: Tensor | None = None,
    ) -> None:
        self.stored, self.device, self.release, self.kept = stored, device or stored.device, release, kept

    def __len__(self) -> int:
        return len(self.stored if self.kept is None else self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.stored.shape[1]

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows of int64 indices (K,), copied: (K, D)."""
        index = index.to(self.stored.device)
        rows = torch.empty(len(index), self.stored.shape[1], device=self.device)
        for begin in range(0, len(index), CHOSEN_AT_ONCE):
            part = index[begin : begin + CHOSEN_AT_ONCE]
            rows[begin : begin + len(part)] = self._read(self.stored[part if self.kept is None else self.kept[part]])
            self.release()
        return rows

    def split(self, step: int) -> Iterator[Tensor]:
        """All rows in order, (step, D) at a time, to be read only; of a mapped file until the next is asked for."""
        for begin in range(0, len(self), step):
            part = slice(begin, begin + step)
            yield self._read(self.stored[part if self.kept is None else self.kept[part]])
            self.release()

    def where(self, wanted: Callable[[Tensor], Tensor], step: int = 1 << 14) -> "PatchRows":
        """The rows for which `wanted`, of (step, D), is True; nothing is copied."""
        if len(self) == 0:
            return self
        mask = torch.cat([wanted(part) for part in self.split(step)]).to(self.stored.device)
        kept = mask.nonzero()[:, 0] if self.kept is None else self.kept[mask]
        return PatchRows(self.stored, self.device, self.release, kept)

    def _read(self, part: Tensor) -> Tensor:
        return part.to(self.device, torch.float32)


Rows = Tensor | PatchRows  # (N, D): both have len, shape, split and a choice of rows by index


class TrainingFeatures:
    """The features of the training samples: the banks are built from them and scored with them.

    One array per bank, filled in place, so that nothing is ever concatenated. For M3DM's three banks a sample takes
    41 MB in float32: 3136 x 1152 + 784 x 768 + 3136 x 1920 numbers. Where all samples would take more than half of the
    memory budget, the arrays are files mapped into memory, in the folder for temporary files (the environment variable
    TMPDIR), which vanish with the process however it ends. What has been read of them is not held in memory.

    Where several processes share a class, each keeps those of its own samples, which follow on those of the rank before
    it, and the banks are built from all of them.

    Args:
        capacity: number of training samples, of this process.
        memory_budget: of this process, GB.
        dtype: of the numbers kept, float32 or float16; zeros stay the only zeros.
        empty: the features of a sample without patches, which a process may need that has no sample.
        group: the processes that share the class.
    """

    def __init__(
        self,
        capacity: int,
        memory_budget: float = float("inf"),
        dtype: torch.dtype = torch.float32,
        *,
        empty: PatchFeatures | None = None,
        group: Group | None = None,
    ) -> None:
        self.capacity = capacity
        self.count = 0
        self.empty = empty or PatchFeatures()
        self.group = group
        self.memory_budget = memory_budget
        self.dtype = dtype
        self.coresets: dict[tuple[Any, ...], Tensor] = {}  # what methods fitted on the same features share
        self._arrays: dict[str, Tensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return self.count

    @property
    def on_disk(self) -> bool:
        return bool(self._maps)

    def append(self, features: PatchFeatures, path: str | None = None) -> None:
        """Keep the features of the next sample, which an error calls by its path, or else by its number.

        Raises:
            InputError: the file that is to hold them does not fit on its disk, or they hold NaN or infinity.
        """
        patches = {name: each for name in BANKS if (each := getattr(features, name)) is not None}
        if not self._arrays:
            self._allocate(patches)
        for name, each in patches.items():
            stored = to_storage(each, self.dtype)
            if not stored.isfinite().all():
                mend = "check its files and the checkpoints"
                if each.isfinite().all():
                    mend = "use --train_feature_dtype fp32"
                raise InputError(
                    f"the {name} features of {path or f'good sample {self.count}'} hold NaN or infinity as "
                    f"{str(self.dtype).removeprefix('torch.')}: {mend}"
                )
            self._arrays[name][self.count] = stored
            self._release(name)
        self.count += 1

    def sample(self, i: int) -> PatchFeatures:
        """Features of the i-th sample, float32; to be read only, since they may be what is stored."""
        features = {}
        for name, array in self._arrays.items():
            self._release(name)
            features[name] = array[i].to(self._device, torch.float32)
        return PatchFeatures(**features)

    def rows(self, name: str, samples: int | None = None) -> PatchRows:
        """Those patches of the first `samples` samples of all processes (None: all) that are here, (rows, C)."""
        if samples is not None:
            samples = max(0, samples - shard_offset(self.count, self.group)[0])
        if not self._arrays:
            return PatchRows(getattr(self.empty, name))
        stored = self._arrays[name][: self.count][:samples].flatten(0, 1)
        return PatchRows(stored, self._device, lambda: self._release(name))

    def _allocate(self, patches: dict[str, Tensor]) -> None:
        self._device = next(iter(patches.values())).device
        needed = {name: self.capacity * each.numel() * self.dtype.itemsize for name, each in patches.items()}
        in_memory = sum(needed.values()) <= FEATURES_SHARE * self.memory_budget * 1e9
        for name, each in patches.items():
            shape = (self.capacity, *each.shape)
            if in_memory:
                self._arrays[name] = each.new_empty(shape, dtype=self.dtype)
            else:
                self._maps[name] = _mapped_file(needed[name])
                self._arrays[name] = torch.frombuffer(self._maps[name], dtype=self.dtype).view(shape)

    def _release(self, name: str) -> None:
        """Let go of the pages of a mapped file: they stay in the file and, while there is room, in the cache."""
        if name in self._maps:
            self._maps[name].madvise(mmap.MADV_DONTNEED)


def _mapped_file(size: int) -> mmap.mmap:
    """Memory of `size` bytes in a file without a name."""
    if file_system_of(Path(tempfile.gettempdir())) in MEMORY_FILE_SYSTEMS:
        logger.warning(
            "the training features go to %s, which is memory and no disk: set the environment variable TMPDIR to a "
            "folder on a disk, or --memory_budget means nothing",
            tempfile.gettempdir(),
        )
    with tempfile.TemporaryFile(prefix="m3dm-features-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is noticed here, not while the map is written
        except OSError as error:
            raise InputError(
                f"the training features take {size / 1e9:.1f} GB, which do not fit in {tempfile.gettempdir()} "
                f"({error.strerror}): set the environment variable TMPDIR to a folder of a larger disk, raise "
                "--memory_budget, or halve them with --train_feature_dtype fp16"
            ) from None
        return mmap.mmap(file.fileno(), size)
