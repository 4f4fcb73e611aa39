"""Published figures appear only with the paper's own settings."""

from collections.abc import Sequence

import pytest

from dataset import DATASET_CLASSES
from runner.settings import applied_flags, detector_configs, make_parser
from utils.reporting.html_report.published import CLASSES, FIGURES, TEST_SAMPLES, published_figures

FULL = ["--method_name", "DINO+Point_MAE+Fusion", "--use_uff"]


def args_of(*flags: object) -> dict:
    """Arguments in the form of results.json."""
    args = make_parser().parse_args(list(map(str, flags)))
    (config,) = detector_configs(args).values()
    return vars(args) | applied_flags(config)


def classes_of(names: Sequence[str] = CLASSES, missing: int = 0) -> dict:
    """Entries of results.json with the published number of test samples, minus `missing`."""
    return {name: {"samples": [{}] * (TEST_SAMPLES.get(name, 26) - missing)} for name in names}


def test_classes_match_the_dataset() -> None:
    assert DATASET_CLASSES["mvtec3d"] == CLASSES


@pytest.mark.parametrize("method", FIGURES)
@pytest.mark.parametrize("key", ["image_rocauc", "pixel_rocauc", "au_pro"])
def test_published_mean_is_the_mean_of_the_classes(method: str, key: str) -> None:
    figures = FIGURES[method]
    values = [figures.classes[name][key] for name in CLASSES]
    assert sum(values) / len(values) == pytest.approx(figures.mean[key], abs=0.00051)


def test_figures_for_the_settings_of_the_paper() -> None:
    found = published_figures(args_of(*FULL), classes_of())
    assert found is not None
    assert found.classes["tire"]["image_rocauc"] == 0.850
    assert found.mean["au_pro"] == 0.964
    assert "CVPR 2023" in found.source


def test_mean_needs_all_ten_classes() -> None:
    found = published_figures(args_of(*FULL), classes_of(CLASSES[:9]))
    assert found is not None
    assert found.mean == {}
    assert found.classes["bagel"]["pixel_rocauc"] == 0.995


def test_3d_only_has_the_figures_of_a_reproduction() -> None:
    found = published_figures(args_of("--method_name", "Point_MAE"), classes_of())
    assert found is not None
    assert (found.classes["cable_gland"]["image_rocauc"], found.mean["image_rocauc"]) == (0.648, 0.863)
    assert "issue 29" in found.source


@pytest.mark.parametrize(
    "flags",
    [
        ["--method_name", "DINO+Point_MAE+Fusion"],  # the ablation without a UFF
        ["--method_name", "DINO"],
        ["--method_name", "DINO+Point_MAE"],
        [*FULL, "--protocol", "corrected"],
        [*FULL, "--rgb_backbone_name", "vit_small_patch8_224_dino"],
        [*FULL, "--xyz_backbone_name", "FPFH"],
        [*FULL, "--dataset_type", "eyecandies"],
        [*FULL, "--point_norm", "running"],
        [*FULL, "--img_size", 448],
        [*FULL, "--num_group", 512],
        [*FULL, "--group_size", 64],
        [*FULL, "--f_coreset", 0.2],
        [*FULL, "--max_sample", 50],
        [*FULL, "--asy_memory_bank", 10],
        [*FULL, "--ocsvm_nu", 0.1],
        [*FULL, "--rgb_smap_lambda", 1],
        [*FULL, "--coreset_eps", 0.5],
        [*FULL, "--ocsvm_maxiter", 10],
        [*FULL, "--precision", "bf16"],
        [*FULL, "--train_feature_dtype", "fp16"],
        [*FULL, "--rgb_checkpoint", "other.pth"],
        [*FULL, "--xyz_checkpoint", "other.pth"],
        ["--method_name", "Point_MAE", "--rm_zero_for_project"],
    ],
)
def test_no_figures_for_other_settings(flags: list) -> None:
    assert published_figures(args_of(*flags), classes_of()) is None


def test_no_figures_for_other_classes() -> None:
    assert published_figures(args_of(*FULL), classes_of(["cookie", "gasket"])) is None
    assert published_figures({}, classes_of()) is None


def test_no_figures_for_another_number_of_samples() -> None:
    assert published_figures(args_of(*FULL), classes_of(missing=1)) is None
