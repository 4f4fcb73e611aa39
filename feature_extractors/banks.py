"""From the features of the training samples to the memory banks of a method."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.config import DetectorConfig
from feature_extractors.memory_bank import BankStatistics, MemoryBank, mean_and_std, select_coreset
from feature_extractors.training_features import PatchRows, TrainingFeatures
from utils.distributed import (
    Group,
    all_gather_rows,
    local_indices,
    place_rows,
    rank,
    shard_offset,
    world_size,
)
from utils.errors import InputError

logger = logging.getLogger(__name__)


class _Shard(NamedTuple):
    """The patches of a bank, before its coreset: those of this process among those of all."""

    rows: PatchRows  # raw
    begin: int  # index of the first of them
    total: int


def build_banks(config: DetectorConfig, features: TrainingFeatures) -> dict[str, MemoryBank]:
    """Statistics, coreset and normalized rows of each bank of the method, in its order (xyz first).

    Where several ranks share the class, none of them holds the patches of another. The bank that the coreset leaves
    goes to all of them.
    """
    method, protocol = config.method, config.protocol
    drop_background = protocol.drop_background or config.rm_zero_for_project
    rows = {name: features.rows(name, None if name == "rgb" else config.asy_memory_bank) for name in method.banks}
    if "xyz" in rows and drop_background:
        rows["xyz"] = _without_background(rows["xyz"], config, features.group)
    statistics = _bank_statistics(config, rows, features.group)
    banks: dict[str, MemoryBank] = {}
    reduced_xyz = None
    for name, raw in rows.items():
        shard = _Shard(raw, *shard_offset(len(raw), features.group))
        base = shard.total if protocol.own_coreset_size or reduced_xyz is None else reduced_xyz
        picks = _select(config, features, name, shard, statistics[name], base)
        own, mine = local_indices(picks, shard.begin, len(raw))
        chosen = statistics[name].normalize(raw[mine])
        last = None  # a row that the bank ends with
        if name == "xyz":
            reduced_xyz = len(picks)
            if drop_background:
                last = statistics[name].normalize(chosen.new_zeros(1, chosen.shape[1]))
            elif method.zero_row:  # zero after normalization, so the mean patch and not the background: the reference's
                without_zero = (chosen != 0).all(dim=1)
                chosen, own = chosen[without_zero], own[without_zero]
                last = chosen.new_zeros(1, chosen.shape[1])
        if last is not None and rank(features.group) == world_size(features.group) - 1:
            chosen, own = torch.cat([chosen, last]), torch.cat([own, own.new_full((1,), len(picks))])
        banks[name] = _make_bank(chosen, own, statistics[name], features.group)
        logger.info("%s bank: %d of %d patches", name, len(banks[name]), shard.total)
    return banks


def _make_bank(chosen: Tensor, order: Tensor, statistics: BankStatistics, group: Group | None) -> MemoryBank:
    """Bank of the rows `chosen` of all ranks, each with its place in the selection."""
    orders = all_gather_rows(order[:, None], group)[0][:, 0].sort().values
    return MemoryBank(place_rows(chosen, torch.searchsorted(orders, order), len(orders), group), statistics)


def _bank_statistics(
    config: DetectorConfig, rows: dict[str, PatchRows], group: Group | None
) -> dict[str, BankStatistics]:
    if config.protocol.own_statistics or config.method.statistics == "own":
        return {name: mean_and_std(raw, group=group) for name, raw in rows.items()}
    if config.method.statistics == "shared":
        mean, std = mean_and_std(rows["xyz"], group=group).mean, mean_and_std(rows["rgb"], group=group).std
        return dict.fromkeys(rows, BankStatistics(mean, std))
    return dict.fromkeys(rows, BankStatistics())


def _without_background(xyz: PatchRows, config: DetectorConfig, group: Group | None) -> PatchRows:
    """The rows of patches with a valid point. --rm_zero_for_project keeps only rows without any exact zero."""

    def wanted(rows: Tensor) -> Tensor:
        nonzero = rows != 0
        return nonzero.all(dim=1) if config.rm_zero_for_project else nonzero.any(dim=1)

    kept = xyz.where(wanted)
    if shard_offset(len(kept), group)[1] == 0:
        raise InputError(
            f"none of the {shard_offset(len(xyz), group)[1]} xyz patches of the training samples is left without "
            "the background: check the scans, or use --protocol reference without --rm_zero_for_project"
        )
    return kept


def _select(
    config: DetectorConfig, features: TrainingFeatures, name: str, shard: _Shard, statistics: BankStatistics, base: int
) -> Tensor:
    """Indices of the coreset of a bank; its size is f_coreset of `base`, within 1 and all rows.

    A coreset is chosen once for all methods that ask for the same one. Without a random_state each chooses its own.
    """
    if config.f_coreset == 1:
        return torch.arange(shard.total, device=shard.rows.device)
    n = min(max(int(config.f_coreset * base), 1), shard.total)
    key = (name, shard.total, statistics, n, config.coreset_eps, config.random_state)
    chosen = features.coresets.get(key)
    if chosen is None:
        eps, seed = config.coreset_eps, config.random_state
        chosen = select_coreset(shard.rows, statistics, n, eps, seed, features.group)
        if seed is not None:
            features.coresets[key] = chosen
    return chosen
