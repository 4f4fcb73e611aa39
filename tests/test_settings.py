"""Effect of every detector setting: another value changes the scores, the maps or both."""

import math
from dataclasses import fields, replace

import pytest
import torch
from tiny_networks import (
    SINGLE,
    SIZE,
    TRIPLE,
    build,
    changes,
    made_up_samples,
    one_thread,  # noqa: F401 (a fixture)
    run,
    run_anew,
    settings,
)

from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig, Protocol


def test_runs_are_reproducible() -> None:
    config = settings(TRIPLE, use_uff=True)
    assert changes(run(config), run_anew(config)) == set()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method_name", METHODS)
def test_every_method_fits_and_predicts(method_name: str, protocol: str) -> None:
    outcome = run(settings(method_name, protocol=PROTOCOLS[protocol], use_uff="Fusion" in method_name))
    banks = list(METHODS[method_name].banks)
    assert list(outcome.detector.banks) == banks
    for prediction in outcome.predictions:
        assert isinstance(prediction.score, float)
        assert math.isfinite(prediction.score)
        assert list(prediction.bank_scores) == list(prediction.bank_maps) == banks
        for plane in (prediction.anomaly_map, *prediction.bank_maps.values()):
            assert plane.shape == (SIZE, SIZE)
            assert plane.dtype == torch.float32
            assert torch.isfinite(plane).all()
    assert outcome.scores[1::2].min() > outcome.scores[::2].max()  # the defective samples score higher


EFFECTS_OF_PROTOCOL = {
    "own_statistics": {"score", "map"},
    "own_coreset_size": {"score", "map"},
    "drop_background": {"score", "map"},
    "unscaled_scores": {"score"},
    "float_blur": {"map"},
    "exact_distances": {"score", "map"},
    "masked_pooling": {"score", "map"},
    "exact_au_pro": set(),  # affects only the report
    "foreground": {"score", "map"},
    "local_spacing": {"map"},
    "noise_units": {"score", "map"},
    "top_score": {"score"},
}


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_effect_of_each_protocol_row(field: str) -> None:
    base = settings(xyz_grid=16) if field == "foreground" else settings()  # all of 8 x 8 patches are near a point
    alone = replace(base, protocol=Protocol(**{field: True}))
    assert changes(run(base), run(alone)) == EFFECTS_OF_PROTOCOL[field]


# field: (base settings, another value)
OTHER_VALUES = {
    "rgb_backbone_name": (settings(), "vit_base_patch8_224"),
    "rgb_layers": (settings(), (3, 5)),
    "xyz_backbone_name": (settings(), "Point_Bert"),
    "use_uff": (settings("Fusion"), True),
    "point_norm": (settings(), "running"),
    "precision": (settings(), "bf16"),
    "img_size": (settings(), 40),
    "xyz_grid": (settings(), 7),
    "num_group": (settings(), 30),
    "group_size": (settings(), 20),
    "f_coreset": (settings(), 0.2),
    "coreset_eps": (settings(), 0.5),
    "random_state": (settings(), 1),
    "asy_memory_bank": (settings(), 2),
    "rm_zero_for_project": (settings(SINGLE), True),
    "ocsvm_nu": (settings(), 0.1),
    "ocsvm_maxiter": (settings(), 1),
}


@pytest.mark.filterwarnings("ignore:Maximum number of iteration reached")
@pytest.mark.parametrize("field", OTHER_VALUES)
def test_each_setting_changes_score_and_map(field: str) -> None:
    config, value = OTHER_VALUES[field]
    assert changes(run(config), run(replace(config, **{field: value}))) == {"score", "map"}


@pytest.mark.parametrize("method_name", ["DINO", "Point_MAE", "Fusion"])
def test_low_precision_returns_fp32_features(method_name: str) -> None:
    """Features are fp32 in every precision of the networks."""
    bank = METHODS[method_name].banks[0]
    sample = made_up_samples("train")[0]
    configs = [settings(method_name, precision=each, use_uff=method_name == "Fusion") for each in ("fp32", "bf16")]
    exact, low = (getattr(build(config)(sample), bank) for config in configs)
    assert low.dtype == exact.dtype == torch.float32
    assert float((low - exact).norm() / exact.norm()) > 1e-4
    if method_name == "DINO":
        assert float((low - exact).norm() / exact.norm()) < 0.02
        kept = low.bfloat16() == low
        assert kept.all()  # values of the last layer in bf16


@pytest.mark.parametrize("bank", range(3))
@pytest.mark.parametrize(("field", "changed"), [("score_lambdas", "score"), ("map_lambdas", "map")])
def test_effect_of_each_lambda(field: str, changed: str, bank: int) -> None:
    values = [1.0, 0.1, 1.0]
    values[bank] *= 3
    assert changes(run(settings(TRIPLE)), run(settings(TRIPLE, **{field: tuple(values)}))) == {changed}


def test_every_setting_is_tested() -> None:
    elsewhere = {
        "method_name",  # covered by tests of every method
        "protocol",  # covered row by row
        "memory_bank",  # at most one value is valid
        "point_ops",  # covered below
        "score_lambdas",  # covered one by one
        "map_lambdas",
    }
    assert {field.name for field in fields(DetectorConfig)} == elsewhere | set(OTHER_VALUES)
    assert {field.name for field in fields(Protocol)} == set(EFFECTS_OF_PROTOCOL)


def test_named_memory_bank_changes_nothing() -> None:
    assert changes(run(settings()), run_anew(settings(memory_bank="multiple"))) == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the extension may be installed")
def test_point_ops_reaches_the_point_searches() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        build(settings(SINGLE, point_ops="extension"))(made_up_samples("train")[0])


def test_methods_differ() -> None:
    outcomes = [run(settings(name)) for name in METHODS]
    for i, one in enumerate(outcomes):
        for other in outcomes[i + 1 :]:
            assert "score" in changes(one, other)
