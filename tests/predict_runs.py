"""Detectors of a tiny dataset, and runs of predict.py in this process."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from main_runs import Run, read_run, write_bagels
from main_runs import call as call_main
from tiny_networks import stub_fusion, stub_rgb, stub_xyz

import predict
from feature_extractors import extractor as extractor_module
from runner.predict_settings import make_parser

SIDE = 64
METHODS = ("DINO", "Point_MAE", "DINO+Point_MAE")


@pytest.fixture(name="stubs", autouse=True, scope="module")
def stubs_fixture() -> Iterator[None]:
    """Tiny networks in place of the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor_module, "build_rgb_backbone", stub_rgb)
        patch.setattr(extractor_module, "build_xyz_backbone", stub_xyz)
        patch.setattr(extractor_module, "build_feature_fusion", stub_fusion)
        yield


class Fitted(NamedTuple):
    """Dataset of four samples with the detectors and results of main.py."""

    data: Path  # folder of the class
    detectors: dict[str, Path]  # by method
    runs: dict[str, Run]


@pytest.fixture(name="fitted", scope="module")
def fitted_fixture(stubs: None, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    root = tmp_path_factory.mktemp("fitted")
    write_bagels(root / "data")
    flags = ["--dataset_path", root / "data", "--classes", "bagel", "--img_size", SIDE, "--num_group", 24]
    flags += ["--group_size", 12, "--f_coreset", 0.05, "--seeds", 0, "--save_preds", "--device", "cpu"]
    flags += ["--save_detector", root / "detectors", "--output_dir", root / "results"]
    call_main("--method_name", *METHODS, *flags)
    return Fitted(
        root / "data/bagel",
        {method: root / "detectors" / method / "bagel" for method in METHODS},
        {method: read_run(root / "results" / method, "") for method in METHODS},
    )


def run(*flags: object) -> int:
    """Run the script in this process; return its exit code."""
    args = make_parser(None).parse_args(list(map(str, flags)))
    with ExitStack() as locks:
        return predict.predict(predict.PredictSettings(**vars(args)), locks)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def write_samples(fitted: Fitted, folder: Path, count: int = 5) -> Path:
    """Write `count` good samples into the folders rgb and xyz."""
    for i in range(count):
        for kind, suffix in (("rgb", ".png"), ("xyz", ".tiff")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(fitted.data / f"train/good/{kind}/00{i % 2}{suffix}", folder / f"{kind}/{i:03d}{suffix}")
    return folder


def flags_for(fitted: Fitted, samples_dir: Path, output: Path, method: str = "DINO+Point_MAE") -> list[object]:
    return [
        *("--detector", fitted.detectors[method], "--output_dir", output, "--device", "cpu"),
        *("--rgb", samples_dir / "rgb", "--xyz", samples_dir / "xyz"),
    ]
