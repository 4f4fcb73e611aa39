"""Raw patch features of the training samples: in memory if the budget allows, else in memory-mapped files."""

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from feature_extractors.alignment import near_points
from feature_extractors.config import BANKS
from feature_extractors.patch_rows import PatchRows, ShardedRows
from utils.distributed import Group, all_gather_counts, rank
from utils.errors import InputError
from utils.feature_store import to_storage
from utils.records import PatchFeatures

logger = logging.getLogger(__name__)

FEATURES_SHARE = 0.5  # of the memory budget; the rest is for the networks, the projected rows, the banks and the maps


class TrainingFeatures:
    """Patch features of the training samples of this rank, to build the banks and to fit decision fusion.

    Each bank has one array. For M3DM's three banks a sample takes 41 MB in float32: 3136 x 1152 + 784 x 768 +
    3136 x 1920 numbers. If all samples would take more than half of the memory budget, the arrays are memory-mapped
    unnamed files in the folder for temporary files (TMPDIR). They vanish with the process.

    `capacity` is the number of training samples of this rank, `memory_budget` its budget in GB, and `group` the ranks
    that share the class. Numbers are stored as `dtype`, float32 or float16; only exact zeros become zero. A rank
    without samples takes the widths of the features from `empty`, the features of a sample without patches.
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
        self.capacity, self.memory_budget, self.dtype = capacity, memory_budget, dtype
        self.empty, self.group, self.count = empty or PatchFeatures(), group, 0
        self.paths: list[str | None] = []  # of the samples
        self._occupied: list[Tensor | None] = []  # of the samples, as in PatchFeatures
        self.coresets: dict[tuple[Any, ...], Tensor] = {}  # shared by methods fitted on the same features
        self._arrays: dict[str, Tensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[PatchFeatures]:
        return (self.sample(i) for i in range(self.count))

    @property
    def first(self) -> int:
        """Number of the first sample of this rank among those of all ranks."""
        return sum(all_gather_counts(self.count, self.group)[: rank(self.group)])

    def total(self, samples: int | None = None) -> int:
        """Number of samples over all ranks, at most `samples`."""
        total = sum(all_gather_counts(self.count, self.group))
        return total if samples is None else min(total, samples)

    @property
    def on_disk(self) -> bool:
        return bool(self._maps)

    def append(self, features: PatchFeatures, path: str | None = None) -> None:
        """Store the features of the next sample; `path` names it in errors.

        Raises InputError if the mapped file does not fit on its disk, or the features hold NaN or infinity.
        """
        patches = {name: each for name in BANKS if (each := getattr(features, name)) is not None}
        if not self._arrays:
            self._allocate(patches)
        for name, each in patches.items():
            stored = to_storage(each, self.dtype)
            if not stored.isfinite().all():
                too_large = each.isfinite().all()
                fix = "Use --train_feature_dtype fp32." if too_large else "Check its files and the checkpoints."
                dtype = str(self.dtype).removeprefix("torch.")
                which = path or f"good sample {self.count}"
                raise InputError(f"The {name} features of {which} hold NaN or infinity as {dtype}. {fix}")
            self._arrays[name][self.count] = stored
            self._release(name)
        self.paths.append(path)
        self._occupied.append(features.occupied)
        self.count += 1

    def sample(self, i: int) -> PatchFeatures:
        """Features of sample i of this rank, float32, read-only."""
        features = {}
        for name, array in self._arrays.items():
            self._release(name)
            features[name] = array[i].to(self._device, torch.float32)
        return PatchFeatures(**features, occupied=self._occupied[i])

    def subset(self, paths: Collection[str]) -> "TrainingFeatures":
        """Copy of the samples of this rank that have these paths."""
        numbers = [number for number, path in enumerate(self.paths) if path in paths]
        chosen = TrainingFeatures(len(numbers), self.memory_budget, self.dtype, empty=self.empty, group=self.group)
        for number in numbers:
            chosen.append(self.sample(number), self.paths[number])
        return chosen

    def rows(self, name: str, samples: int | None = None, foreground: bool = False) -> ShardedRows:
        """Patches (N, C) of the first `samples` samples over all ranks, None for all.

        With `foreground`, only those near a point of the cloud, see alignment.near_points.
        """
        if samples is not None:
            samples = max(0, samples - self.first)
        if not self._arrays:
            return ShardedRows(PatchRows(getattr(self.empty, name)), self.group)
        stored = self._arrays[name][: self.count][:samples]
        kept = None
        if foreground:
            grid = math.isqrt(stored.shape[1])
            near = torch.zeros(len(stored), grid**2, dtype=torch.bool)
            for row, occupied in zip(near, self._occupied, strict=False):
                assert occupied is not None
                row[:] = near_points(occupied, grid)
            kept = near.flatten().nonzero()[:, 0].to(stored.device)
        rows = PatchRows(stored.flatten(0, 1), self._device, lambda: self._release(name), kept)
        return ShardedRows(rows, self.group)

    def _allocate(self, patches: dict[str, Tensor]) -> None:
        self._device = next(iter(patches.values())).device
        needed = {name: self.capacity * each.numel() * self.dtype.itemsize for name, each in patches.items()}
        in_memory = sum(needed.values()) <= FEATURES_SHARE * self.memory_budget * 1e9
        if not in_memory:
            place = "the training features go to files in %s. If it is in memory (tmpfs), set TMPDIR to one on a disk"
            logger.info(place, tempfile.gettempdir())
        for name, each in patches.items():
            shape = (self.capacity, *each.shape)
            if in_memory:
                self._arrays[name] = each.new_empty(shape, dtype=self.dtype)
            else:
                self._maps[name] = _mapped_file(needed[name])
                self._arrays[name] = torch.frombuffer(self._maps[name], dtype=self.dtype).view(shape)

    def _release(self, name: str) -> None:
        """Release the pages of a mapped file from the memory of this process."""
        if name in self._maps:
            self._maps[name].madvise(mmap.MADV_DONTNEED)


def _mapped_file(size: int) -> mmap.mmap:
    """Memory map of an unnamed file of `size` bytes; InputError if the disk is too small."""
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(prefix="m3dm-features-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # detects a full disk before the map is written
        except OSError as error:
            raise InputError(
                f"The training features take {size / 1e9:.1f} GB, which do not fit in {folder} ({error.strerror}). Set "
                "the environment variable TMPDIR to a folder of a larger disk, raise --memory_budget, or halve them "
                "with --train_feature_dtype fp16."
            ) from None
        return mmap.mmap(file.fileno(), size)
