"""The extended protocol against a plain form of it, and the effects of its steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_networks import (
    DOUBLE,
    SIZE,
    TRAIN,
    TRIPLE,
    Outcome,
    build,
    fit,
    made_up_samples,
    one_thread,  # noqa: F401 (a fixture)
    run,
    settings,
)
from torch import Tensor

from feature_extractors import reference
from feature_extractors.config import BANKS, METHODS, PROTOCOLS, DetectorConfig, Protocol
from feature_extractors.pipeline import collect_features, fit_detector
from utils.errors import InputError
from utils.records import PatchFeatures

Patches = Mapping[str, Tensor]
EXTENDED = PROTOCOLS["extended"]


class Bank(NamedTuple):
    """Plain bank: rows (N, D), normalization, root of the spacing (N,), and samples (N,) that the rows are from."""

    rows: Tensor
    mean: float
    std: float
    root: Tensor
    owners: Tensor


def test_detector_of_each_method_equals_the_plain_form() -> None:
    for name in METHODS:
        config = settings(name, protocol=EXTENDED, xyz_grid=16)
        detector, features = fit(config)
        good = [by_bank(features.sample(i)) for i in range(len(features))]
        tested = detector.extractor.extract(made_up_samples("test"))
        scores, maps = plain_fit_and_score(config, good, [by_bank(each) for each in tested])
        predictions = detector.predict_features(tested)
        np.testing.assert_allclose([each.score for each in predictions], scores, rtol=1e-4, err_msg=name)
        found = np.stack([each.anomaly_map for each in predictions])
        np.testing.assert_allclose(found, maps, rtol=1e-3, atol=1e-4 * maps.max(), err_msg=name)


def by_bank(features: PatchFeatures) -> Patches:
    return {name: patches for name in BANKS if (patches := getattr(features, name)) is not None}


def plain_fit_and_score(
    config: DetectorConfig, good: Sequence[Patches], test: Sequence[Patches]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) and maps (n, S, S) of n test samples."""
    banks = {name: plain_bank(config, name, good) for name in config.method.banks}
    scores, maps = zip(*(plain_results(config, banks, patches) for patches in test), strict=True)
    if len(banks) == 1:
        return np.concatenate(scores), np.concatenate(maps)
    held_out = []  # each training sample against the banks without its own rows
    for number, patches in enumerate(good):
        others = {name: plain_without(bank, number) for name, bank in banks.items()}
        held_out.append(plain_results(config, others, patches))
    good_scores, good_maps = (np.stack(each, axis=1) for each in zip(*held_out, strict=True))  # (K, n), (K, n, S, S)
    noise_of_scores = np.array([np.median(of_bank) for of_bank in good_scores])
    noise_of_maps = np.array([np.quantile(of_bank[of_bank > 0], 0.99) for of_bank in good_maps])
    fused = [(score / noise_of_scores).max() for score in scores]
    return np.array(fused), np.stack([(each / noise_of_maps[:, None, None]).max(axis=0) for each in maps])


def plain_bank(config: DetectorConfig, name: str, good: Sequence[Patches]) -> Bank:
    grid = math.isqrt(len(good[0][name]))
    rows = torch.cat([patches[name] for patches in good])
    owners = torch.arange(len(good)).repeat_interleave(grid**2)
    kept = torch.ones(len(rows), dtype=torch.bool)
    if "xyz" in config.method.modalities:
        kept = torch.cat([plain_foreground(patches["xyz"], grid) for patches in good])
    if name == "xyz":
        kept &= (rows != 0).any(dim=1)
    rows, owners = rows[kept], owners[kept]
    mean, std = float(rows.mean()), float(rows.std())
    rows = (rows - mean) / std
    projected = reference.random_projection(rows, config.coreset_eps, config.random_state)
    chosen = reference.greedy_coreset(projected, int(config.f_coreset * len(rows)))
    rows, owners = rows[chosen], owners[chosen]
    if name == "xyz":
        rows = torch.cat([rows, torch.full((1, rows.shape[1]), -mean / std)])
        owners = torch.cat([owners, torch.tensor([-1])])
    distances = torch.cdist(rows.double(), rows.double()).sort(dim=1).values[:, 1:11]
    return Bank(rows, mean, std, distances.mean(dim=1).sqrt().float(), owners)


def plain_without(bank: Bank, sample: int) -> Bank:
    others = bank.owners != sample
    return bank._replace(rows=bank.rows[others], root=bank.root[others])


def plain_results(config: DetectorConfig, banks: Mapping[str, Bank], patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    """Scores (K,) and maps (K, S, S) of a sample against K banks."""
    maps = []
    for name, bank in banks.items():
        normalized = (patches[name] - bank.mean) / bank.std
        nearest = torch.cdist(normalized.double(), bank.rows.double()).sort(dim=1)
        relative = nearest.values[:, :3] / bank.root[nearest.indices[:, :3]]
        distances = relative.prod(dim=1).pow(1 / 3).float()
        if "xyz" in config.method.modalities:
            distances = distances * plain_foreground(patches["xyz"], math.isqrt(len(distances)))
        plane = reference.anomaly_map(distances, SIZE, float_blur=True)
        if "xyz" in config.method.modalities:
            plane = plane * plain_foreground(patches["xyz"], SIZE).view(SIZE, SIZE)
        maps.append(plane.double().numpy())
    highest = [np.sort(plane, axis=None)[-int(0.01 * SIZE**2) :].mean() for plane in maps]
    return np.array(highest), np.stack(maps)


def plain_foreground(xyz: Tensor, grid: int) -> Tensor:
    """Patches that hold a point or are next to an xyz patch with one: (grid**2,) bool."""
    side = math.isqrt(len(xyz))
    occupied = np.pad((xyz != 0).any(dim=1).view(side, side).numpy(), 1)
    reached = np.array([[occupied[i : i + 3, j : j + 3].any() for j in range(side)] for i in range(side)])
    bins = [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    return torch.tensor([bool(reached[rows, columns].any()) for rows in bins for columns in bins])


def only(*names: str) -> Outcome:
    """Three banks with these fields of the protocol alone."""
    protocol = Protocol(**dict.fromkeys(names, True))
    return run(settings(TRIPLE, protocol=protocol, xyz_grid=16, f_coreset=1.0))


def test_background_leaves_all_banks_and_the_map() -> None:
    before, after = only(), only("foreground")
    near = [plain_foreground(before.features.sample(i).xyz, 16) for i in range(TRAIN)]
    kept = int(torch.cat(near).sum())
    assert 0 < kept < TRAIN * 16**2
    assert {name: len(bank) for name, bank in before.detector.banks.items()}["fusion"] == TRAIN * 16**2
    assert {name: len(bank) for name, bank in after.detector.banks.items()}["fusion"] == kept
    for sample, prediction in zip(made_up_samples("test"), after.predictions, strict=True):
        far = ~plain_foreground(after.detector.extractor(sample).xyz, SIZE).view(SIZE, SIZE)
        assert far.any()
        for plane in (prediction.anomaly_map, *prediction.bank_maps.values()):
            assert (plane[far] == 0).all()
            assert (plane[~far] > 0).any()


def test_images_without_clouds_have_no_foreground() -> None:
    protocol = Protocol(foreground=True)
    assert not settings("DINO", protocol=protocol).has_foreground
    assert run(settings("DINO", protocol=protocol)).scores.equal(run(settings("DINO")).scores)


def test_one_training_sample_has_no_noise() -> None:
    config = settings(DOUBLE, protocol=EXTENDED)
    extractor = build(config)
    features = collect_features(extractor, made_up_samples("train")[:1], 1)
    with pytest.raises(InputError, match=r"compares the training samples with each other, but there is only one\."):
        fit_detector(config, extractor, features)
    alone = replace(config, method_name="DINO")
    assert fit_detector(alone, extractor, features).decision_fusion is None  # a single bank needs no units
