"""Memory banks of a method, from the features of the training samples (section 3.4 of the paper)."""

import logging

import torch
from torch import Tensor

from feature_extractors.config import DetectorConfig
from feature_extractors.coreset import select_coreset
from feature_extractors.memory_bank import BankStatistics, MemoryBank, mean_and_std
from feature_extractors.patch_rows import ShardedRows
from feature_extractors.training_features import TrainingFeatures
from utils.errors import InputError

logger = logging.getLogger(__name__)

Rows = dict[str, ShardedRows]  # raw patches of each bank, in the order of the method


def build_banks(config: DetectorConfig, features: TrainingFeatures) -> dict[str, MemoryBank]:
    """Memory banks of the method, out of M_xyz, M_rgb and M_fusion. Fast form of `reference.build_banks`.

    Each rank holds the patches of its own samples, and every rank gets a copy of the banks. Raises InputError if the
    configuration drops background patches from the xyz bank and there are no others.
    """
    rows = {name: features.rows(name, config.samples_of(name), config.has_foreground) for name in config.method.banks}
    if "xyz" in rows and config.drops_background:
        rows["xyz"] = _without_background(rows["xyz"], config)
    # 1. Statistics: mean and standard deviation that normalize each bank
    statistics = _bank_statistics(config, rows)
    # 2. Selection: the coreset of each bank
    picks = _select(config, features, rows, statistics)
    # 3. Assembly: normalized coresets, and the background row of xyz
    banks = {}
    for name, raw in rows.items():
        selected = statistics[name].normalize(raw.take(picks[name]))  # (K, C)
        owners = raw.samples(picks[name], features.total(config.samples_of(name)))  # (K,)
        if name == "xyz":
            selected, owners = _with_background_row(selected, owners, statistics[name], config)
        bank = MemoryBank(selected, statistics[name], owners=owners)
        banks[name] = bank.with_spacing() if config.protocol.local_spacing else bank
        logger.info("%s bank: %d of %d patches", name, len(banks[name]), len(raw))
    return banks


def _without_background(xyz: ShardedRows, config: DetectorConfig) -> ShardedRows:
    """Patches with a valid point; with --rm_zero_for_project, those without any exact zero."""
    enough = torch.all if config.rm_zero_for_project else torch.any
    kept = xyz.where(lambda patches: enough(patches != 0, dim=1))
    if len(kept) == 0:
        raise InputError(
            f"All {len(xyz)} xyz patches of the training samples are background. Check the point clouds, or use "
            "--protocol reference without --rm_zero_for_project."
        )
    return kept


def _bank_statistics(config: DetectorConfig, rows: Rows) -> dict[str, BankStatistics]:
    if config.protocol.own_statistics or config.method.statistics == "own":
        return {name: mean_and_std(raw) for name, raw in rows.items()}
    if config.method.statistics == "shared":
        shared = BankStatistics(mean_and_std(rows["xyz"]).mean, mean_and_std(rows["rgb"]).std)
        return dict.fromkeys(rows, shared)
    return dict.fromkeys(rows, BankStatistics())


def _select(
    config: DetectorConfig, features: TrainingFeatures, rows: Rows, statistics: dict[str, BankStatistics]
) -> dict[str, Tensor]:
    """Indices (K,) of each bank's coreset. With a fixed random_state, methods with the same coreset share it.

    K is f_coreset times the size of the bank. In the reference protocol, rgb and fusion banks beside an xyz bank take
    f_coreset times the size of its coreset.
    """
    picks: dict[str, Tensor] = {}
    for name, raw in rows.items():
        if config.f_coreset == 1:
            picks[name] = torch.arange(len(raw), device=raw.device)
            continue
        base = len(raw) if config.protocol.own_coreset_size else len(picks.get("xyz", raw))
        n = min(max(int(config.f_coreset * base), 1), len(raw))
        key = (name, len(raw), statistics[name], n, config.coreset_eps, config.random_state)
        chosen = features.coresets.get(key)
        if chosen is None:
            chosen = select_coreset(raw, statistics[name], n, config.coreset_eps, config.random_state)
        if config.random_state is not None:
            features.coresets[key] = chosen
        picks[name] = chosen
    return picks


def _with_background_row(
    xyz: Tensor, owners: Tensor, statistics: BankStatistics, config: DetectorConfig
) -> tuple[Tensor, Tensor]:
    """Selected xyz patches (K, C) and their owners, followed by a row for the background if one is added."""
    zero = xyz.new_zeros(1, xyz.shape[1])
    of_nobody = owners.new_full((1,), -1)
    if config.drops_background:
        return torch.cat([xyz, statistics.normalize(zero)]), torch.cat([owners, of_nobody])
    if config.method.zero_row:  # zero after normalization is the mean patch, not the background
        kept = (xyz != 0).all(dim=1)
        return torch.cat([xyz[kept], zero]), torch.cat([owners[kept], of_nobody])
    return xyz, owners
