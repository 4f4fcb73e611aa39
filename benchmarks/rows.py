"""The steps of the benchmark, each timed beside its plain twin and beside a matrix product of the same precision."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks import plain
from benchmarks.measuring import PRODUCT_SIDE, matrix_product, median_seconds
from benchmarks.workload import (
    SEED,
    Networks,
    Size,
    build_networks,
    coreset_flops,
    detector_config,
    group_encoder_flops,
    point_transformer_flops,
    search_flops,
    vit_flops,
)
from feature_extractors.alignment import align_to_patches
from feature_extractors.coreset import select_coreset
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from feature_extractors.pipeline import collect_features
from models.point_transformer import PointFeatures, PointTransformer
from utils.metrics import evaluate as compute_metrics
from utils.precision import autocast
from utils.records import PatchFeatures, Sample

F_CORESET, CORESET_EPS = 0.1, 0.9  # the defaults of DetectorConfig
Work = Callable[[], object]


class Row(NamedTuple):
    """One step: "plain", the precisions of the fast form, and where it is of use another form by its name."""

    name: str
    seconds: dict[str, float]  # median, by form
    flops: dict[str, float]  # counted, by form; a form without products of matrices is left out
    product: dict[str, float]  # rate of the matrix product in the same turns, FLOP/s, by precision

    def ratio(self, form: str) -> float:
        return self.seconds["plain"] / self.seconds[form]

    def rate(self, form: str) -> float:
        """FLOP/s."""
        return self.flops[form] / self.seconds[form]

    def share(self, form: str) -> float:
        """Of the rate of the matrix product in the precision of the form."""
        return self.rate(form) / self.product["bf16" if form == "bf16" else "fp32"]

    def record(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "ratio": {form: self.ratio(form) for form in self.seconds if form != "plain"},
            "gflop_per_second": {form: self.rate(form) / 1e9 for form in self.flops},
            "share_of_product": {form: self.share(form) for form in self.flops},
        }


def measure_row(
    name: str,
    works: Mapping[str, Work],
    flops: Mapping[str, float],
    repeats: int,
    warm_up: bool = True,
) -> Row:
    """Time the forms of a step in turns with the matrix products that they are held against."""
    precisions = ["fp32", *(["bf16"] if "bf16" in works else [])]
    products = {f"product {precision}": matrix_product(precision) for precision in precisions}
    with torch.inference_mode():
        seconds = median_seconds({**works, **products}, repeats, warm_up, name)
    rates = {precision: 2 * PRODUCT_SIDE**3 / seconds.pop(f"product {precision}") for precision in precisions}
    return Row(name, seconds, dict(flops), rates)


def _at(precision: str, work: Work) -> Work:
    """The work with the arithmetic that PatchExtractor runs networks in."""

    def run() -> object:
        with autocast(torch.device("cpu"), precision):
            return work()

    return run


def feature_rows(size: Size, samples: list[Sample], precisions: list[str], repeats: int) -> list[Row]:
    """The parts of extracting one sample, the whole of it, and all samples as fitting collects them."""
    slow = plain.make_plain(build_networks(size))
    fast = {each: PatchExtractor(detector_config(size, each), *build_networks(size)) for each in precisions}
    count = len(samples)
    of_pictures = f"ViT of {count} pictures"
    parts = {of_pictures: _vit_parts(slow, fast, samples)}
    parts |= _point_network_parts(slow, fast, samples[0]) | _point_parts(slow, size, samples[0])
    vit = dict.fromkeys(("plain", *precisions), vit_flops(slow.rgb))
    encoder = dict.fromkeys(precisions, group_encoder_flops(slow.xyz))
    encoder["plain"] = group_encoder_flops(slow.xyz, plain=True)
    tokens = dict.fromkeys(vit, point_transformer_flops(slow.xyz))
    flops = {
        of_pictures: {form: count * value for form, value in vit.items()},
        "group encoder": encoder,
        "point transformer": tokens,
    }
    rows = [measure_row(name, works, flops.get(name, {}), repeats) for name, works in parts.items()]
    one: dict[str, Work] = {"plain": partial(plain.extract, slow, samples[0], size.xyz_grid)}
    one |= {each: partial(fast[each], samples[0]) for each in precisions}
    of_one = {form: vit[form] + encoder[form] + tokens[form] for form in vit}
    rows.append(measure_row("features of a sample", one, of_one, repeats))
    many: dict[str, Work] = {"plain": lambda: [plain.extract(slow, each, size.xyz_grid) for each in samples]}
    many |= {each: partial(collect_features, fast[each], samples, count) for each in precisions}
    of_many = {form: count * value for form, value in of_one.items()}
    return [*rows, measure_row(f"features of {count} samples", many, of_many, repeats, warm_up=False)]


def _vit_parts(slow: Networks, fast: Mapping[str, PatchExtractor], samples: Sequence[Sample]) -> dict[str, Work]:
    """The pictures one by one, and together."""
    pictures = [sample.rgb for sample in samples if sample.rgb is not None]
    works: dict[str, Work] = {"plain": lambda: [plain.rgb_patches(slow.rgb, picture) for picture in pictures]}
    for precision, extractor in fast.items():
        assert extractor.rgb_backbone is not None
        works[precision] = _at(precision, partial(extractor.rgb_backbone, torch.stack(pictures)))
    return works


@torch.inference_mode()
def _point_network_parts(
    slow: Networks, fast: Mapping[str, PatchExtractor], sample: Sample
) -> dict[str, dict[str, Work]]:
    """The parts of the 3D network alone, on the same input."""
    ((groups, centers),) = slow.xyz.group([_points(sample)])
    tokens = slow.xyz.reduce_dim(plain.encode_groups(slow.xyz.encoder, groups))[None]
    position = slow.xyz.pos_embed(centers)[None]
    parts: dict[str, dict[str, Work]] = {
        "group encoder": {"plain": partial(plain.encode_groups, slow.xyz.encoder, groups)},
        "point transformer": {"plain": partial(plain.transform, slow.xyz, tokens, centers)},
    }
    for precision, extractor in fast.items():
        xyz = cast(PointTransformer, extractor.xyz_backbone)
        parts["group encoder"][precision] = _at(precision, partial(xyz.encoder, groups))
        parts["point transformer"][precision] = _at(precision, partial(xyz.blocks, tokens, position, xyz.taken))
    return parts


@torch.inference_mode()
def _point_parts(slow: Networks, size: Size, sample: Sample) -> dict[str, dict[str, Work]]:
    """Searches and alignment, which are the same in every precision."""
    assert sample.xyz is not None
    points = _points(sample)
    tokens, centers = plain.point_tokens(slow.xyz, points)
    found = PointFeatures(tokens, centers)
    return {
        "point search": {
            "plain": partial(plain.group, points, size.num_group, size.group_size),
            "fp32": partial(slow.xyz.group, [points]),
        },
        "alignment": {
            "plain": partial(plain.pooled_plane, tokens, centers, sample.xyz, size.xyz_grid),
            "fp32": partial(align_to_patches, found, sample.xyz, size.xyz_grid),
        },
    }


def _points(sample: Sample) -> Tensor:
    """(N, 3) valid points."""
    assert sample.xyz is not None
    return sample.xyz[:, (sample.xyz != 0).all(dim=0)].T.contiguous()


def coreset_row(rows: Tensor, stop: int | None, repeats: int) -> tuple[Row, Tensor]:
    """Projection and selection of a tenth of raw rows (N, D); also the indices selected by the fast form.

    The plain loop ends after `stop` picks and counts as if it had gone on; None: it does go on, and is timed once.
    """
    n = max(int(F_CORESET * len(rows)), 1)
    statistics = BankStatistics(float(rows.mean()), float(rows.std()))
    projected = plain.project(statistics.normalize(rows), CORESET_EPS, SEED)
    chosen: list[Tensor] = []
    works: dict[str, Work] = {
        "fp32": lambda: chosen.append(select_coreset(rows, statistics, n, CORESET_EPS, SEED)),
        "projection": lambda: plain.project(statistics.normalize(rows), CORESET_EPS, SEED),
        "picks": lambda: plain.greedy_coreset(projected, n, stop),
    }
    flops = coreset_flops(len(rows), projected.shape[1], n)
    row = measure_row(
        f"coreset {len(rows)} x {rows.shape[1]} to {n}", works, {"fp32": flops}, repeats if stop else 1, warm_up=False
    )
    scale = (n - 1) / max(min(n, stop or n) - 1, 1)
    seconds = {"fp32": row.seconds["fp32"], "plain": row.seconds["projection"] + scale * row.seconds["picks"]}
    return row._replace(seconds=seconds, flops={**row.flops, "plain": flops}), chosen[-1]


def scoring_row(size: Size, queries: Tensor, bank: Tensor, repeats: int) -> Row:
    """Image score and map of a sample's patches (M, D) against a bank (N, D); "cdist + min" is the search alone."""
    config = detector_config(size, "fp32", method_name="Point_MAE")
    detector = Detector(config, PatchExtractor(config, None, None), {"xyz": MemoryBank(bank)})
    epsilon = config.method.weight_epsilon
    works: dict[str, Work] = {
        "plain": partial(plain.score_bank, queries, bank, size.img_size, epsilon=epsilon),
        "fp32": partial(detector.predict_features, PatchFeatures(xyz=queries)),
        "cdist + min": lambda: torch.cdist(queries, bank).min(dim=1),
    }
    flops = dict.fromkeys(works, search_flops(len(queries), len(bank), bank.shape[1]))
    return measure_row(f"scoring {len(queries)} x {len(bank)} x {bank.shape[1]}", works, flops, repeats)


def metrics_row(count: int, side: int, repeats: int) -> Row:
    """All figures of `count` made-up maps, of which every second has defects."""
    rng = np.random.default_rng(SEED)
    masks = np.zeros((count, side, side), np.uint8)
    for mask in masks[1::2]:
        relief = gaussian_filter(rng.standard_normal((side, side)), side / 28)
        mask[:] = relief > np.quantile(relief, 0.97)
    noise = gaussian_filter(rng.standard_normal(masks.shape), (0, 4, 4))
    maps = (noise / noise.std() + masks).astype(np.float32)
    labels = masks.any(axis=(1, 2)).astype(int).tolist()
    scores = maps.max(axis=(1, 2)).tolist()
    works: dict[str, Work] = {
        "plain": partial(plain.measure_maps, labels, scores, masks, maps),
        "fp32": partial(compute_metrics, labels, scores, masks, maps),
    }
    return measure_row(f"metrics of {count} maps {side} x {side}", works, {}, repeats, warm_up=False)
