"""Tables of methods and protocols, defaults, and refused configurations."""

from dataclasses import FrozenInstanceError, replace
from itertools import combinations

import pytest

from feature_extractors.config import (
    BANKS,
    METHODS,
    PROTOCOLS,
    DetectorConfig,
    Method,
    Protocol,
    covering_method,
)
from utils.choices import POINT_NORMS, POINT_OPS, PRECISIONS
from utils.errors import InputError

# banks; decision fusion; bank statistics; divisor of distances; constant added to the sum of exponentials; zero row
PUBLISHED = {
    "DINO": Method(("rgb",), "none", "own", 1.0, 1e-5, False),
    "Point_MAE": Method(("xyz",), "none", "none", 1.0, 1e-5, False),
    "Fusion": Method(("fusion",), "none", "none", 1.0, 0.0, False),
    "DINO+Point_MAE": Method(("xyz", "rgb"), "svm", "shared", 1000.0, 0.0, False),
    "DINO+Point_MAE+add": Method(("xyz", "rgb"), "sum", "shared", 1.0, 0.0, False),
    "DINO+Point_MAE+Fusion": Method(("xyz", "rgb", "fusion"), "svm", "shared", 1.0, 0.0, True),
}
SINGLE = ["DINO", "Point_MAE", "Fusion"]
MULTIPLE = ["DINO+Point_MAE", "DINO+Point_MAE+add", "DINO+Point_MAE+Fusion"]


def test_methods_are_the_published_ones() -> None:
    assert METHODS == PUBLISHED
    assert BANKS == ("xyz", "rgb", "fusion")
    for method in METHODS.values():
        assert list(method.banks) == [name for name in BANKS if name in method.banks]  # order of the lambdas


def test_each_method_needs_the_modalities_of_its_banks() -> None:
    both = {"rgb", "xyz"}
    expected = {"DINO": {"rgb"}, "Point_MAE": {"xyz"}, "Fusion": both} | dict.fromkeys(MULTIPLE, both)
    assert {name: set(method.modalities) for name, method in METHODS.items()} == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["DINO"], "DINO"),
        (["Point_MAE"], "Point_MAE"),
        (["Fusion"], "Fusion"),
        (["DINO+Point_MAE"], "DINO+Point_MAE"),
        (["DINO+Point_MAE+Fusion"], "DINO+Point_MAE+Fusion"),
        (["Point_MAE", "Point_MAE"], "Point_MAE"),
        (["DINO", "Point_MAE"], "DINO+Point_MAE"),
        (["Point_MAE", "DINO+Point_MAE+add"], "DINO+Point_MAE+add"),  # one of the given methods
        (["DINO+Point_MAE", "DINO+Point_MAE+add"], "DINO+Point_MAE"),
        (["Fusion", "DINO"], "DINO+Point_MAE+Fusion"),
        (["Fusion", "Point_MAE"], "DINO+Point_MAE+Fusion"),
        (["DINO+Point_MAE+Fusion", "DINO"], "DINO+Point_MAE+Fusion"),
        (list(METHODS), "DINO+Point_MAE+Fusion"),
    ],
)
def test_covering_method_of_several(names: list[str], expected: str) -> None:
    assert covering_method(names) == expected
    assert covering_method(iter(names)) == expected


def test_the_covering_method_has_the_banks_of_any_methods_and_no_more() -> None:
    for count in range(1, len(METHODS) + 1):
        for names in combinations(METHODS, count):
            needed = {bank for name in names for bank in METHODS[name].banks}
            found = set(METHODS[covering_method(names)].banks)
            assert found >= needed
            # only the triple method has a fusion bank beside another one
            assert found == needed or (found == set(BANKS) and {"fusion"} < needed)


CORRECTIONS = (
    *("own_statistics", "own_coreset_size", "drop_background", "unscaled_scores", "float_blur"),
    *("exact_distances", "masked_pooling", "exact_au_pro"),
)
EXTENSIONS = ("foreground", "local_spacing", "noise_units", "top_score")


def test_each_protocol_turns_its_fields_on() -> None:
    assert list(PROTOCOLS) == ["reference", "corrected", "extended"]
    assert PROTOCOLS["reference"] == DetectorConfig().protocol
    fields_on = {name: [field for field, on in vars(protocol).items() if on] for name, protocol in PROTOCOLS.items()}
    expected = {"reference": [], "corrected": [*CORRECTIONS], "extended": [*CORRECTIONS, *EXTENSIONS]}
    assert fields_on == expected


def test_units_of_noise_replace_the_fusion_of_several_banks() -> None:
    found = {name: DetectorConfig(method_name=name, protocol=Protocol(noise_units=True)) for name in METHODS}
    assert {name: config.decision_fusion for name, config in found.items()} == (
        dict.fromkeys(SINGLE, "none") | dict.fromkeys(MULTIPLE, "noise")
    )
    assert found["DINO+Point_MAE"].lambdas_of_banks == ((1.0, 1.0), (1.0, 1.0))


def test_defaults_are_the_flags_of_the_original() -> None:
    config = DetectorConfig()
    assert config == DetectorConfig(
        method_name="DINO+Point_MAE+Fusion",
        memory_bank=None,  # "multiple" in the original, which the default method needs
        rgb_backbone_name="vit_base_patch8_224_dino",
        xyz_backbone_name="Point_MAE",
        use_uff=False,
        protocol=PROTOCOLS["reference"],
        point_norm="cloud",
        point_ops="auto",
        precision="fp32",
        img_size=224,
        xyz_grid=56,
        group_size=128,
        num_group=1024,
        f_coreset=0.1,
        coreset_eps=0.9,
        random_state=None,
        asy_memory_bank=None,
        rm_zero_for_project=False,
        ocsvm_nu=0.5,
        ocsvm_maxiter=1000,
        score_lambdas=(1.0, 0.1, 1.0),
        map_lambdas=(1.0, 0.1, 1.0),
    )
    assert config.method is METHODS["DINO+Point_MAE+Fusion"]
    assert config.method.memory_bank == "multiple"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        DetectorConfig().f_coreset = 0.2


@pytest.mark.parametrize("name", METHODS)
def test_each_method_accepts_only_its_kind_of_memory_bank(name: str) -> None:
    needed, other = ("single", "multiple") if name in SINGLE else ("multiple", "single")
    assert METHODS[name].memory_bank == needed
    assert DetectorConfig(method_name=name).memory_bank is None
    DetectorConfig(method_name=name, memory_bank=needed)
    with pytest.raises(InputError, match=f"Use --memory_bank {needed} instead of {other}") as error:
        DetectorConfig(method_name=name, memory_bank=other)
    assert ", ".join(METHODS[name].banks) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "allowed", "fix"),
    [
        ({"use_uff": True}, {"Fusion", "DINO+Point_MAE+Fusion"}, "Remove it or use Fusion"),
        ({"rm_zero_for_project": True}, {"Point_MAE"}, "Remove it"),
        ({"asy_memory_bank": 3}, set(MULTIPLE), "Use --max_sample"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_flag_is_refused_by_methods_without_its_bank(
    name: str, flag: dict[str, object], allowed: set[str], fix: str
) -> None:
    if name in allowed:
        DetectorConfig(method_name=name, **flag)
        return
    with pytest.raises(InputError) as error:
        DetectorConfig(method_name=name, **flag)
    message = str(error.value)
    assert f"--{next(iter(flag))}" in message
    assert name in message
    assert fix in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("f_coreset", [1e-6, 0.5, 1.0], [0.0, -0.1, 1.001, float("nan")]),
        ("coreset_eps", [1e-3, 0.999], [0.0, 1.0, -0.5, float("nan")]),
        ("ocsvm_nu", [1e-3, 1.0], [0.0, 1.001, -1.0, float("nan")]),
        ("ocsvm_maxiter", [1, 10_000], [0, -1]),
        ("img_size", [58, 512], [57, 0]),  # the grid has 56 patches a side
        ("num_group", [3, 2048], [2, 0]),
        ("group_size", [1, 256], [0, -1]),
        ("random_state", [None, 0, 2**32 - 1], [-1, 2**32]),
        ("asy_memory_bank", [None, 1], [0, -1]),
    ],
)
def test_numbers_are_checked_against_their_range(field: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        assert getattr(DetectorConfig(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(InputError, match=rf"--{field} is {value}\. Give \w+") as error:
            DetectorConfig(**{field: value})
        assert "\n" not in str(error.value)


def test_the_grid_has_to_fit_into_the_image() -> None:
    """xyz_grid is at most img_size - 2, the number of windows that the first pooling has along a side."""
    DetectorConfig(img_size=32, xyz_grid=30)
    with pytest.raises(InputError, match=r"--img_size is 32\. Give at least 33 for 31 xyz patches a side"):
        DetectorConfig(img_size=32, xyz_grid=31)


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("method_name", METHODS),
        ("point_norm", POINT_NORMS),
        ("point_ops", POINT_OPS),
        ("precision", PRECISIONS),
        ("memory_bank", ("single", "multiple")),
    ],
)
def test_unknown_choices_are_refused(field: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        DetectorConfig(**{field: "typo"})
    assert str(error.value) == f"--{field} is 'typo'. Give one of {', '.join(allowed)}."
    for value in allowed:
        if field != "memory_bank":
            assert getattr(DetectorConfig(**{field: value}), field) == value


def test_a_changed_copy_is_checked_as_well() -> None:
    config = DetectorConfig(use_uff=True)
    with pytest.raises(InputError, match="--use_uff has no effect on DINO"):
        replace(config, method_name="DINO")
