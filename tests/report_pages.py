"""Made-up evaluation results for the tests of the report: disks seen from above, some with a dent."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.au_pro import ThinCurve
from utils.metrics import evaluate
from utils.records import Prediction, SampleResult
from utils.reporting.html_report.class_report import ClassReport, report_class
from utils.reporting.html_report.report_page import report_page
from utils.reporting.results_json import results_record

SIDE = 64
COMMAND = ["main.py", "--method_name", "DINO+Point_MAE"]
ARGS = {"method_name": "DINO+Point_MAE", "dataset_type": "mvtec3d", "dataset_path": "parts", "protocol": "reference"}
NOTE = "Backbones: rgb efficientnet_lite0, xyz FPFH. Protocol: reference."


def made_up_sample(path: str, score: float, side: int = SIDE, banks: Sequence[str] = ("xyz", "rgb")) -> SampleResult:
    """Evaluated sample whose map is as strong as its score; it is defective unless its folder is good."""
    label = int("/good/" not in path)
    rng = np.random.default_rng(abs(hash_of(path)))
    row, column = np.mgrid[:side, :side] / side
    middle = rng.uniform(0.35, 0.65, 2)
    dent = np.exp(-((row - middle[0]) ** 2 + (column - middle[1]) ** 2) / 0.008)
    mask = torch.from_numpy((label * dent > 0.4).astype(np.uint8))
    maps = [torch.from_numpy((dent * score + 0.1 * rng.random((side, side))).astype(np.float32)) for _ in banks]
    fused = torch.stack(maps).sum(dim=0)
    return SampleResult(
        path,
        label,
        mask,
        Prediction(score, fused, dict.fromkeys(banks, score / 2), dict(zip(banks, maps, strict=True))),
        seconds=0.05,
    )


def hash_of(text: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(text))


def made_up_samples(count: int = 12, **changed: Any) -> list[SampleResult]:
    """Samples, half of them good, whose scores overlap: a threshold of 0.5 gives misses and false alarms."""
    rng = np.random.default_rng(count)
    samples = []
    for i in range(count):
        defect = ("good", "hole", "good", "stain & dent")[i % 4]
        score = float(np.clip(rng.normal(0.35 if defect == "good" else 0.65, 0.16), 0, 1.2))
        samples.append(made_up_sample(f"test/{defect}/{i:03d}", score, **changed))
    return samples


def made_up_image(number: int, side: int = 2 * SIDE) -> np.ndarray:
    """Brown, shaded disk on black, (side, side, 3) uint8."""
    row, column = np.mgrid[:side, :side] / side - 0.5
    inside = np.hypot(row, column) < 0.42
    shade = 0.75 + 0.25 * np.sin(24 * column + number) * np.cos(22 * row)
    return (inside[..., None] * shade[..., None] * np.array([206, 152, 92])).astype(np.uint8)


def made_up_cloud(number: int, side: int = 2 * SIDE) -> np.ndarray:
    """Dome 84 mm wide, half a meter away, without background, (side, side, 3) float32, meters."""
    row, column = np.mgrid[:side, :side] / side - 0.5
    inside = np.hypot(row, column) < 0.42
    height = 0.02 * np.sqrt(np.clip(1 - (np.hypot(row, column) / 0.45) ** 2, 0, 1))
    dent = 0.008 * np.exp(-((row - 0.1) ** 2 + column**2) / 0.004) * (number % 2)
    xyz = np.stack([0.1 * column, 0.1 * row, 0.5 - height + dent], axis=-1)
    xyz[np.abs(xyz) < 1e-7] = 1e-7
    return (xyz * inside[..., None]).astype(np.float32)


def metrics_and_curve(evaluated: Sequence[SampleResult]) -> tuple[dict[str, Any], ThinCurve | None]:
    return evaluate(
        [sample.label for sample in evaluated],
        [sample.prediction.score for sample in evaluated],
        [sample.mask.numpy() for sample in evaluated],
        [sample.prediction.anomaly_map.numpy() for sample in evaluated],
    )


def entry_of(evaluated: Sequence[SampleResult], threshold: float | None = 0.5, **changed: Any) -> dict[str, Any]:
    """Entry of a class in results.json; threshold None means not calibrated."""
    entry, _ = metrics_and_curve(evaluated)
    entry |= {
        "split": "test",
        "samples": [
            {
                "path": sample.path,
                "label": sample.label,
                "score": sample.prediction.score,
                "severity": None if threshold is None else (sample.prediction.score - 0.3) / (threshold - 0.3),
            }
            for sample in evaluated
        ],
        "seconds": {"extract": 20.5, "coreset": 4.0, "fuse": 2.5, "score": 6.0, "metrics": 1.0},
        "peak_memory_mb": 2304.0,
        "f1": 0.8,
        "f1_threshold": 0.45,
        "precision": 0.7,
        "recall": 0.9,
        "false_alarm_rate": 0.1,
        "latency": {"p50": 0.05, "p95": 0.07, "p99": 0.11},
    }
    if threshold is not None:
        entry["threshold"] = {"image": threshold, "pixel": 1.0, "target_fpr": 0.01, "source": "validation", "parts": 22}
    else:
        entry |= {"threshold": None, "precision": None, "recall": None, "false_alarm_rate": None}
    return entry | changed


def made_up_class(
    name: str = "gasket",
    evaluated: Sequence[SampleResult] | None = None,
    limit: int = 24,
    image: bool = True,
    cloud: bool = True,
    **changed: Any,
) -> ClassReport:
    evaluated = made_up_samples() if evaluated is None else evaluated
    return report_class(
        name,
        entry_of(evaluated, **changed),
        evaluated,
        metrics_and_curve(evaluated)[1],
        lambda i: made_up_image(i) if image else None,
        lambda i: made_up_cloud(i) if cloud else None,
        limit,
    )


def made_up_page(
    *classes: ClassReport,
    args: dict[str, Any] | None = None,
    note: str | None = NOTE,
    command: Sequence[str] = COMMAND,
) -> str:
    record = results_record(command, ARGS | (args or {}), {each.name: each.entry for each in classes})
    return report_page(record, classes, note)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._within:
            while self._within.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._within):
            self.text.append(data)


class ReadPage(NamedTuple):
    """Text and tags of a page, as a browser would see them."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read_page(page: str) -> ReadPage:
    parser = _Text()
    parser.feed(page)
    return ReadPage(" ".join(" ".join(parser.text).split()), parser.tags)


def samples_of(page: str) -> list[dict[str, Any]]:
    """Samples in the page's JSON block, which its script reads."""
    found = re.search(r'<script type="application/json" id="samples">(.*?)</script>', page, re.DOTALL)
    return json.loads(found.group(1))["samples"] if found else []
