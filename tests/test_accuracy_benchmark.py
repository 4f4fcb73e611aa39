"""Accuracy benchmark: trials, variants of protocols, kept features and results, and tables."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, accuracy_features
from benchmarks.accuracy import HELD_OUT, make_trials, make_variants
from benchmarks.accuracy_features import EXTRACTION_FIELDS, RGB, Trial
from benchmarks.accuracy_tables import classes_table, differences_table, means_table
from benchmarks.workload import SIZES, build_networks, detector_config, made_up_samples
from feature_extractors.config import PROTOCOLS, Protocol
from feature_extractors.extractor import PatchExtractor
from utils.synthetic_data.parts import PARTS

FULL = accuracy_features.FULL


def test_confirming_trials_are_not_used_for_choosing() -> None:
    args = argparse.Namespace(seeds=6, classes=list(PARTS), img_size=224, images=None)
    by_set = {}
    for name in accuracy.SETS:
        args.set = [name]
        by_set[name] = make_trials(args)
    assert {each.seed for each in by_set["choosing"]}.isdisjoint(each.seed for each in by_set["confirming"])
    assert len(by_set["choosing"]) == 3 * (len(PARTS) - 1)
    assert HELD_OUT not in {each.class_name for each in by_set["choosing"]}
    assert len(by_set["confirming"]) == 3 * len(PARTS)


def test_variants_differ_from_their_protocol_in_one_field() -> None:
    corrected, extended = PROTOCOLS["corrected"], PROTOCOLS["extended"]
    variants = make_variants()
    assert set(PROTOCOLS) <= set(variants)
    for base, sign, other in ((corrected, "corrected + ", extended), (extended, "extended - ", corrected)):
        for name, protocol in variants.items():
            if name.startswith(sign):
                changed = [
                    each.name for each in fields(Protocol) if getattr(protocol, each.name) != getattr(base, each.name)
                ]
                assert changed == [name.removeprefix(sign)]
                assert getattr(protocol, changed[0]) == getattr(other, changed[0])


def test_fields_that_change_the_features_are_listed() -> None:
    size = SIZES["tiny"]
    networks, sample = build_networks(size), made_up_samples(1, "train", size.img_size)[0]

    def features(protocol: Protocol) -> torch.Tensor:
        extracted = PatchExtractor(detector_config(size, "fp32", protocol=protocol, method_name=FULL), *networks)(
            sample
        )
        return torch.cat([patches.flatten() for patches in extracted if patches is not None])

    plain = features(PROTOCOLS["reference"])
    for each in fields(Protocol):
        one_field = Protocol(**{each.name: True})
        assert (not torch.equal(features(one_field), plain)) == (each.name in EXTRACTION_FIELDS), each.name


TRIALS = [Trial("cookie", 224, 0), Trial("cookie", 224, 2), Trial("peach", 224, 0)]
RESULTS = {
    (trial.name, RGB, variant): [value, 0.5, 0.5, 0.1]
    for trial, pair in zip(TRIALS, ((0.5, 0.7), (0.6, 0.6), (0.9, 1.0)), strict=True)
    for variant, value in zip(PROTOCOLS, pair, strict=False)
}


def row(table: str, name: str) -> list[str]:
    """Cells of the row of a Markdown table that begins with a name."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(each for each in cells if each[0] == name)


def test_tables_hold_means_deviations_and_standard_errors() -> None:
    means = means_table(RESULTS, TRIALS, [RGB], ["reference"])
    assert row(means, f"`{RGB}`")[1:4] == ["reference", "0.650 ± 0.071", "0.500 ± 0.000"]  # of the seeds' 0.7 and 0.6
    differences = differences_table(RESULTS, TRIALS, RGB, ["reference", "corrected"])
    assert row(differences, "corrected")[1] == "+0.100 ± 0.058"  # of 0.2, 0 and 0.1
    assert row(differences, "corrected")[-1] == "+0.025 ± 0.014"
    by_class = classes_table(RESULTS, TRIALS, RGB, "corrected")
    assert row(by_class, "cookie")[1] == "+0.100 ± 0.100"
    assert row(by_class, "peach")[1] == "+0.100"


@pytest.mark.slow
def test_benchmark_measures_each_variant_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = dict.fromkeys(accuracy_features.COUNTS, 1)
    monkeypatch.setattr(accuracy_features, "COUNTS", counts)
    flags = ["--set", "choosing", "--classes", "cookie", "--seeds", "1", "--img_size", "64", "--methods", RGB, FULL]
    accuracy.main([*flags, "--variants", "reference", "--work_dir", str(tmp_path)])
    assert row(capsys.readouterr().out, f"`{FULL}`")[1] == "reference"
    monkeypatch.setattr(accuracy, "fit_and_test", lambda *_: pytest.fail("measured twice"))
    accuracy.main([*flags, "--variants", "reference", "--work_dir", str(tmp_path)])
    assert "## choosing" in capsys.readouterr().out
