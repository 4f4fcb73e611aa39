"""Published metrics of M3DM, shown beside a run with exactly the paper's settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Arguments of the published tables that affect the numbers.
PAPER_ARGS = {
    "dataset_type": "mvtec3d", "protocol": "reference", "precision": "fp32", "train_feature_dtype": "fp32",
    "rgb_backbone_name": "vit_base_patch8_224_dino", "xyz_backbone_name": "Point_MAE",
    "rgb_layers": None, "rgb_checkpoint": None, "xyz_checkpoint": None, "few_shot": None,
    "point_norm": "cloud", "img_size": 224, "group_size": 128, "num_group": 1024,
    "f_coreset": 0.1, "coreset_eps": 0.9, "asy_memory_bank": None, "rm_zero_for_project": False,
    "ocsvm_nu": 0.5, "ocsvm_maxiter": 1000,
    "xyz_s_lambda": 1.0, "rgb_s_lambda": 0.1, "fusion_s_lambda": 1.0,
    "xyz_smap_lambda": 1.0, "rgb_smap_lambda": 0.1, "fusion_smap_lambda": 1.0,
}  # fmt: skip
LEAST_MAX_SAMPLE = 400  # above the size of the largest training split
CLASSES = ("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire")
# Sizes of the test splits of MVTec 3D-AD, 1197 in all. They are compared because other data may use the same names.
TEST_SAMPLES = dict(zip(CLASSES, (110, 108, 159, 131, 130, 100, 132, 114, 101, 112), strict=True))


class Published(NamedTuple):
    """Metrics of one method under the keys of results.json; `mean` is over all of CLASSES."""

    source: str
    classes: Mapping[str, Mapping[str, float]]
    mean: Mapping[str, float]


def _of_classes(**rows: tuple[float, ...]) -> Mapping[str, Mapping[str, float]]:
    """Metrics of each class, from rows in the order of CLASSES; au_pro has limit 0.3 and 100 thresholds."""
    return {name: {key: row[i] for key, row in rows.items()} for i, name in enumerate(CLASSES)}


FIGURES = {
    "DINO+Point_MAE+Fusion": Published(
        "Wang et al., Multimodal Industrial Anomaly Detection via Hybrid Fusion, CVPR 2023",
        _of_classes(
            image_rocauc=(0.994, 0.909, 0.972, 0.976, 0.960, 0.942, 0.973, 0.899, 0.972, 0.850),
            pixel_rocauc=(0.995, 0.993, 0.997, 0.985, 0.985, 0.984, 0.996, 0.994, 0.997, 0.996),
            au_pro=(0.970, 0.971, 0.979, 0.950, 0.941, 0.932, 0.977, 0.971, 0.971, 0.975),
        ),
        {"image_rocauc": 0.945, "pixel_rocauc": 0.992, "au_pro": 0.964},
    ),
    "Point_MAE": Published(
        "a user's run of the original code, github.com/nomewang/M3DM, issue 29",
        _of_classes(
            image_rocauc=(0.945, 0.648, 0.971, 0.983, 0.832, 0.766, 0.870, 0.919, 0.869, 0.824),
            pixel_rocauc=(0.981, 0.949, 0.996, 0.934, 0.959, 0.927, 0.988, 0.994, 0.994, 0.983),
            au_pro=(0.948, 0.821, 0.977, 0.883, 0.881, 0.746, 0.954, 0.973, 0.948, 0.936),
        ),
        {"image_rocauc": 0.863, "pixel_rocauc": 0.971, "au_pro": 0.907},
    ),
}


def published_figures(args: Mapping[str, Any], classes: Mapping[str, Mapping[str, Any]]) -> Published | None:
    """Published metrics for a run of these arguments and classes (of results.json), or None where its setting differs.

    The number of test samples of every class must be the paper's too; the mean also needs all ten classes.
    """
    figures = FIGURES.get(str(args.get("method_name")))
    wanted = dict(PAPER_ARGS)
    if figures is None or any(TEST_SAMPLES.get(name) != len(entry["samples"]) for name, entry in classes.items()):
        return None
    if args["method_name"] == "Point_MAE":
        del wanted["rgb_backbone_name"], wanted["rgb_layers"]  # no RGB branch
    else:
        wanted["use_uff"] = True
    few = (args.get("max_sample") or 0) < LEAST_MAX_SAMPLE  # or unknown, as with --load_detector
    if few or any(args.get(key) != value for key, value in wanted.items()):
        return None
    return figures if set(classes) == set(CLASSES) else figures._replace(mean={})
