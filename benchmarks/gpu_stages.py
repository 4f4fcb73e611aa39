"""Stages of a prediction, each run on its own, from copying samples to the device to copying results back.

The limit of a stage is the longer of two times: its operations at the rate of a large matrix product, or its bytes at
the rate of a large copy. Only operations in matrix products count, see count_flops. A search counts 2 M N D for M
queries and N rows of width D, or three times as many where a GPU multiplies bf16 halves. The bytes are those of the
inputs, weights, bank and outputs, each moved once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.measuring import count_flops, synchronize
from benchmarks.workload import distance_flops
from feature_extractors import detector as detector_module
from feature_extractors.alignment import Clouds, align_to_patches
from feature_extractors.detector import Batch, Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.scoring import anomaly_maps, image_scores
from models.point_transformer import PointFeatures, PointTransformer
from models.row_search import Found
from utils.memory import read_back
from utils.precision import autocast
from utils.records import PatchFeatures, Sample

HALVES = 3  # products of bf16 halves that replace one fp32 product


class Rates(NamedTuple):
    """Measured rates of a device."""

    product: Mapping[str, float]  # operations per second in a large matrix product, by precision
    copy: Mapping[str, float]  # bytes per second: within "memory" (read plus written), and from the "host"


class Stage(NamedTuple):
    """One stage of a prediction, on a batch."""

    name: str
    work: Callable[[], object]
    flops: float
    moved: int  # bytes
    precision: str  # of the operations
    path: str  # of the bytes: "memory" or "host"

    def limit(self, rates: Rates) -> float:
        """Lower bound of the time of the stage, in seconds."""
        return max(self.flops / rates.product[self.precision], self.moved / rates.copy[self.path])


class Queries(NamedTuple):
    """Normalized patches of B samples for one bank, and the distinct ones; see `detector.distinct_patches`."""

    patches: Tensor  # (B, P, D)
    rows: Tensor  # (M, D), the distinct patches
    place: Tensor  # (B, P) int64, index of each patch in `rows`


class Stages:
    """List of stages in order. A stage runs when it is added, because later stages need its result."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: list[Stage] = []

    def run(
        self,
        name: str,
        work: Callable[[], Any],
        inputs: object,
        precision: str = "fp32",
        *,
        path: str = "memory",
        flops: float | None = None,
    ) -> Any:
        """Add a stage and return the result of its `work`. `inputs` holds each tensor that it reads."""
        result = work()
        synchronize(self.device)  # a later stage may use another stream, which would not wait for this one
        counted = count_flops(work) if flops is None else flops
        self.found.append(Stage(name, work, counted, tensor_bytes([inputs, result]), precision, path))
        return result


def tensor_bytes(nested: object) -> int:
    """Bytes of all tensors in nested lists, tuples and dicts."""
    return sum(each.nbytes for each in tree_leaves(nested) if isinstance(each, Tensor))


def weights(*networks: nn.Module | None) -> list[Tensor]:
    return [each for network in networks if network is not None for each in network.parameters()]


class StagedPrediction(NamedTuple):
    """Stages of a prediction, and its results."""

    stages: list[Stage]
    results: list[tuple[Tensor, Tensor]]  # scores (K, b) and maps (K, b, S, S) of each batch, see Detector._score
    complete: bool  # True if all searches were complete; otherwise predict_batch scores the batch again


def stages_of(detector: Detector, samples: Sequence[Sample]) -> StagedPrediction:
    """Stages of Detector.predict_batch for these samples, in the reference protocol."""
    stages = Stages(detector.extractor.device)
    features = add_extraction(stages, detector.extractor, samples)
    return add_scoring(stages, detector, features)


@torch.inference_mode()
def add_extraction(stages: Stages, extractor: PatchExtractor, samples: Sequence[Sample]) -> list[PatchFeatures]:
    """Add the stages of PatchExtractor.extract, and return its features."""
    xyz, uff, precision = extractor.xyz_backbone, extractor.feature_fusion, extractor.precision
    assert isinstance(xyz, PointTransformer)
    assert uff is not None
    inputs = stages.run("copy to the device", partial(extractor.prepare, samples), (), path="host")
    images, clouds = inputs.images, inputs.clouds
    of_vit = [images, weights(extractor.rgb_backbone)]
    rgb = stages.run("ViT", partial(extractor._rgb_patches, images), of_vit, precision)
    groups = stages.run("point sampling and neighbors", lambda: [xyz.group(each.each()) for each in clouds], clouds)
    of_encoder = [groups, weights(xyz)]
    encode = partial(_encode, extractor, xyz, groups)
    found = stages.run("group encoder and point transformer", encode, of_encoder, precision)
    patches = stages.run("alignment", partial(_align, extractor, found, clouds), [found, clouds])
    pairs = list(zip(patches, rgb.split([len(each) for each in patches]), strict=True))
    of_uff = [pairs, weights(uff.xyz_norm, uff.xyz_mlp, uff.rgb_norm, uff.rgb_mlp)]
    fused = stages.run("UFF", lambda: [extractor._fuse(*pair) for pair in pairs], of_uff, precision)
    columns = zip(rgb, chain(*patches), chain(*fused), inputs.occupied, strict=True)
    return [PatchFeatures(*each) for each in columns]


def _encode(
    extractor: PatchExtractor, xyz: PointTransformer, groups: Iterable[tuple[Tensor, Tensor]]
) -> list[list[PointFeatures]]:
    with autocast(extractor.device, extractor.precision):
        found = [xyz.encode(*each) for each in groups]
    return [[PointFeatures(each.features.float(), each.centers) for each in of_batch] for of_batch in found]


def _align(
    extractor: PatchExtractor, found: Sequence[Sequence[PointFeatures]], clouds: Sequence[Clouds]
) -> list[Tensor]:
    grid = extractor.config.xyz_grid
    return [align_to_patches(*pair, grid) for pair in zip(found, clouds, strict=True)]


@torch.inference_mode()
def add_scoring(stages: Stages, detector: Detector, features: list[PatchFeatures]) -> StagedPrediction:
    """Add the stages of Detector.predict_features."""
    on_cpu = stages.device.type == "cpu"
    step = detector_module.SCORED_TOGETHER_ON_CPU if on_cpu else len(features)
    parts = [features[begin : begin + step] for begin in range(0, len(features), step)]
    batches = [Batch(part, "cancelling", None, bounded=not on_cpu) for part in parts]
    queries = stages.run("queries", partial(_queries, detector, batches), features)
    found: dict[str, list[Found]] = {}
    for name, bank in detector.banks.items():
        rows = [each.rows for each in queries[name]]
        flops, precision = search_cost(bank, sum(map(len, rows)))
        search = partial(_search, bank, rows, batches)
        found[name] = stages.run(f"search of the {name} bank", search, [rows, bank.rows], precision, flops=flops)
    distances = [
        [found[name][i].distance[queries[name][i].place] for name in detector.banks] for i in range(len(batches))
    ]
    nearest = [found, [bank.rows for bank in detector.banks.values()]]
    scores = stages.run("image scores", partial(_image_scores, detector, queries, found), nearest)
    size = detector.config.img_size
    maps = stages.run("maps and blur", lambda: [anomaly_maps(each, size) for each in distances], distances)
    results = stages.run("decision fusion", partial(_fuse, detector, scores, maps), [scores, maps])
    back = stages.run("copy back", lambda: [read_back(*each) for each in results], (), path="host")
    complete = all(bool(each.complete) for of_bank in found.values() for each in of_bank)
    return StagedPrediction(stages.found, [(each[0], each[1]) for each in back], complete)


def search_cost(bank: MemoryBank, queries: int) -> tuple[float, str]:
    """Operations and precision of the products of `queries` queries with all rows of a bank."""
    flops = distance_flops(queries, *bank.rows.shape)
    return (HALVES * flops, "bf16") if bank._search.halved else (flops, "fp32")


def _queries(detector: Detector, batches: Sequence[Batch]) -> dict[str, list[Queries]]:
    made: dict[str, list[Queries]] = {}
    for name, bank in detector.banks.items():
        made[name] = []
        for batch in batches:
            patches = bank.statistics.normalize(torch.stack([getattr(each, name) for each in batch.features]))
            rows, _, place = detector_module.distinct_patches(name, batch, patches)
            made[name].append(Queries(patches, rows, place))
    return made


def _search(bank: MemoryBank, rows: Sequence[Tensor], batches: Sequence[Batch]) -> list[Found]:
    pairs = zip(rows, batches, strict=True)
    return [bank.search(each, batch.expanded, batch.left_out, batch.bounded) for each, batch in pairs]


def _image_scores(detector: Detector, queries: dict[str, list[Queries]], found: dict[str, list[Found]]) -> list[Tensor]:
    """Image scores (K, b) of each batch."""
    method, of_banks = detector.config.method, []
    for name, bank in detector.banks.items():
        pairs = zip(queries[name], found[name], strict=True)
        given = [(query.patches, each.distance[query.place], each.row[query.place]) for query, each in pairs]
        of_banks.append([image_scores(*each, bank, method.score_divisor, method.weight_epsilon) for each in given])
    return [torch.stack(each) for each in zip(*of_banks, strict=True)]


def _fuse(detector: Detector, scores: Sequence[Tensor], maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Scores and maps of each batch; the fused ones come last."""
    assert detector.decision_fusion is not None
    results = []
    for of_scores, of_maps in zip(scores, maps, strict=True):
        score, plane = detector.decision_fusion.fuse(list(of_scores), list(of_maps))
        results.append((torch.cat([of_scores, score[None]]), torch.cat([of_maps, plane[None]])))
    return results
