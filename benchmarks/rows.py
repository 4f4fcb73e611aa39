"""Rows of the table of stages: each step timed in turns with its plain form and with a matrix product."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.measuring import PRODUCT_SIDE, count_flops, matrix_product, median_seconds
from feature_extractors import reference
from feature_extractors.alignment import align_to_patches, pack_clouds
from feature_extractors.coreset import select_coreset
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from feature_extractors.pipeline import collect_features
from models.point_transformer import PointFeatures, PointTransformer
from utils.precision import autocast
from utils.records import PatchFeatures, Sample

F_CORESET, CORESET_EPS = 0.1, 0.9  # the defaults of DetectorConfig
Work = Callable[[], object]


class Row(NamedTuple):
    """One step in several forms: "plain", the precisions of the fast form, and others by their names."""

    name: str
    seconds: dict[str, float]  # median, by form
    flops: dict[str, float]  # by form, where the step has matrix products
    product: dict[str, float]  # rate of the matrix product in the same turns, FLOP/s, by precision

    def ratio(self, form: str) -> float:
        return self.seconds["plain"] / self.seconds[form]

    def share(self, form: str) -> float:
        """Rate of the operations of a form over that of the matrix product in its precision."""
        return self.flops[form] / self.seconds[form] / self.product["bf16" if form == "bf16" else "fp32"]

    def record(self) -> dict[str, dict[str, float]]:
        ratios = {form: self.ratio(form) for form in self.seconds if form != "plain"}
        shares = {form: self.share(form) for form in self.flops}
        return {"seconds": self.seconds, "ratio": ratios, "share_of_product": shares}


def measure_row(
    name: str, works: Mapping[str, Work], flops: Mapping[str, float], repeats: int, warm_up: bool = True
) -> Row:
    """Time the forms of a step in turns with a matrix product in each of their precisions."""
    precisions = ["fp32", *(["bf16"] if "bf16" in works else [])]
    products = {f"product {precision}": matrix_product(precision) for precision in precisions}
    with torch.inference_mode():
        seconds = median_seconds({**works, **products}, repeats, warm_up)
    rates = {precision: 2 * PRODUCT_SIDE**3 / seconds.pop(f"product {precision}") for precision in precisions}
    return Row(name, seconds, dict(flops), rates)


def _at(precision: str, work: Work) -> Work:
    """Run the work in the precision that PatchExtractor uses for networks."""

    def run() -> object:
        with autocast(torch.device("cpu"), precision):
            return work()

    return run


@torch.inference_mode()
def feature_rows(size: workload.Size, samples: list[Sample], precisions: list[str], repeats: int) -> list[Row]:
    """Rows of the steps of extraction, of a whole sample, and of all samples as fitting collects them."""
    networks, plain = workload.build_networks(size), workload.plain_networks(size)
    fast = {}
    for precision in precisions:
        config = workload.detector_config(size, precision)
        fast[precision] = PatchExtractor(config, *workload.build_networks(size))
    points, xyz = workload.valid_points(samples[0]), cast(Tensor, samples[0].xyz)
    images = [sample.rgb for sample in samples if sample.rgb is not None]
    (groups,), (centers,) = networks.xyz.group([points])
    tokens, position = plain["xyz"].encoder(groups), plain["xyz"].pos_embed(centers)
    found = PointFeatures(*plain["xyz"](points))
    count = len(samples)

    def point_search() -> None:
        picked = points[reference.farthest_point_sample(points, size.num_group)]
        reference.knn(picked, points, size.group_size)

    def alignment() -> Tensor:
        at_points = reference.three_nn_interpolate(points, centers, found.features)
        return reference.project_and_pool(at_points, (xyz != 0).all(dim=0), size.xyz_grid)

    def features(count: int) -> None:
        for sample in samples[:count]:
            workload.plain_features(config, plain, sample)

    steps: dict[str, dict[str, Work]] = {
        f"ViT of {count} images": {"plain": lambda: [reference.rgb_patches(plain["rgb"], each) for each in images]},
        "group encoder": {"plain": partial(plain["xyz"].encoder, groups)},
        "point transformer": {"plain": partial(through_blocks, plain["xyz"], tokens, position)},
        "point search": {"plain": point_search, "fp32": partial(networks.xyz.group, [points])},
        "alignment": {"plain": alignment, "fp32": lambda: align_to_patches([found], pack_clouds([xyz]), size.xyz_grid)},
        "features of a sample": {"plain": partial(features, 1)},
        f"features of {count} samples": {"plain": partial(features, count)},
    }
    vit, encoder, transformer, _, _, one, many = steps.values()
    for precision, extractor in fast.items():
        network = cast(PointTransformer, extractor.xyz_backbone)
        vit[precision] = _at(precision, partial(cast(Any, extractor.rgb_backbone), torch.stack(images)))
        encoder[precision] = _at(precision, partial(network.encoder, groups))
        transformer[precision] = _at(precision, partial(through_blocks, network, tokens[None], position[None]))
        one[precision] = partial(extractor, samples[0])
        many[precision] = partial(collect_features, extractor, samples, count)
    flops: dict[str, dict[str, float]] = {name: {} for name in steps}
    for form in vit:
        parts = [count_flops(works[form]) for works in (vit, encoder, transformer)]
        one_sample = parts[0] / count + parts[1] + parts[2]
        for name, value in zip(steps, [*parts, 0, 0, one_sample, count * one_sample], strict=True):
            flops[name] |= {form: value} if value else {}
    return [measure_row(name, works, flops[name], repeats) for name, works in steps.items()]


def through_blocks(network: Any, tokens: Tensor, position: Tensor) -> Tensor:
    """The blocks of a point transformer, fast or plain."""
    for block in network.blocks["blocks"].children():
        tokens = block(tokens + position)
    return tokens


def coreset_row(rows: Tensor, stop: int | None, repeats: int) -> tuple[Row, Tensor]:
    """Projection and selection of a tenth of raw rows (N, D); also the indices that the fast form selects.

    The plain loop ends after `stop` picks, and its time is extrapolated. None: it runs to the end, once.
    """
    n = max(int(F_CORESET * len(rows)), 1)
    statistics = BankStatistics(float(rows.mean()), float(rows.std()))
    projected = reference.random_projection(statistics.normalize(rows), CORESET_EPS, workload.SEED)
    chosen: list[Tensor] = []
    works: dict[str, Work] = {
        "fp32": lambda: chosen.append(select_coreset(rows, statistics, n, CORESET_EPS, workload.SEED)),
        "projection": lambda: reference.random_projection(statistics.normalize(rows), CORESET_EPS, workload.SEED),
        "picks": partial(reference.greedy_coreset, projected, min(n, stop or n)),
    }
    name = f"coreset {len(rows)} x {rows.shape[1]} to {n}"
    flops = workload.distance_flops(n, len(rows), projected.shape[1])
    row = measure_row(name, works, {"fp32": flops}, repeats if stop else 1, warm_up=False)
    scale = (n - 1) / max(min(n, stop or n) - 1, 1)
    seconds = {"fp32": row.seconds["fp32"], "plain": row.seconds["projection"] + scale * row.seconds["picks"]}
    return row._replace(seconds=seconds, flops={"fp32": flops, "plain": flops}), chosen[-1]


def scoring_row(size: workload.Size, queries: Tensor, bank: Tensor, repeats: int) -> Row:
    """Score and map of a sample's patches (M, D) against a bank (N, D).

    "cdist + min" is the plain search alone, and "search" is the fast one. "bare product" is the matrix product in both.
    """
    config = workload.detector_config(size, "fp32", method_name="Point_MAE")
    memory_bank = MemoryBank(bank)
    detector = Detector(config, PatchExtractor(config, None, None), {"xyz": memory_bank})
    plain_bank = {"xyz": reference.Bank(bank, 0.0, 1.0)}
    works: dict[str, Work] = {
        "plain": partial(reference.score_banks, config, plain_bank, {"xyz": queries}),
        "fp32": partial(detector.predict_features, [PatchFeatures(xyz=queries)]),
        "cdist + min": partial(reference.nearest_rows, queries, bank),
        "search": partial(memory_bank.search, queries),
        "bare product": lambda: queries @ bank.T,
    }
    flops = dict.fromkeys(works, workload.distance_flops(len(queries), len(bank), bank.shape[1]))
    return measure_row(f"scoring {len(queries)} x {len(bank)} x {bank.shape[1]}", works, flops, repeats)
