"""Check of clouds: tables of good and bad clouds, properties of random clouds, and the forms of a dataset."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import call_script, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from main_runs import write_bagels

import main as main_script
import predict
from dataset import make_sample
from runner.dataset_check import check_split, dataset_forms
from utils import preprocessing
from utils.choices import UNITS
from utils.errors import InputError
from utils.records import METERS, CloudForm, SampleFiles
from utils.scans.cloud_check import DRAWN, checked_cloud, class_distance
from utils.scans.organized_pc import read_organized_pc, write_organized_pc


def surface(height: int = 40, width: int = 50, distance: float = 0.5, seed: int = 0) -> np.ndarray:
    """Cloud (height, width, 3) float32, meters, camera frame: a wavy surface at a distance."""
    rng = np.random.default_rng(seed)
    v, u = np.indices((height, width)) + 0.3  # no pixel on an axis of the camera
    z = distance * (1 + 0.02 * np.sin(u / 5) + rng.normal(0, 1e-3, (height, width)))
    return np.stack([(u - width / 2) * z / width, (v - height / 2) * z / width, z], axis=-1).astype(np.float32)


def filled(share: float, point: object, cloud: np.ndarray | None = None) -> np.ndarray:
    """A surface with the first `share` of its pixels set to `point`."""
    xyz = surface() if cloud is None else cloud
    flat = xyz.reshape(-1, 3)
    flat[: round(share * len(flat))] = point
    return xyz


def upside_down() -> np.ndarray:
    return surface() * np.float32([1, -1, -1])


def with_z(share: float, z: float) -> np.ndarray:
    xyz = surface()
    xyz.reshape(-1, 3)[: round(share * 2000), 2] = z
    return xyz


def with_wall(share: float, noise: float, step: float = 1e-6) -> np.ndarray:
    """A surface, and a wall at 6 m beside it; z is a multiple of `step`."""
    xyz = surface()
    z = 6 + np.random.default_rng(0).normal(0, noise, round(share * 2000)) + np.arange(round(share * 2000)) % 40 / 200
    xyz.reshape(-1, 3)[: len(z), 2] = z
    xyz[..., 2] = np.round(xyz[..., 2] / step) * step
    return xyz


def repeated_row() -> np.ndarray:
    return np.tile(surface()[:1], (40, 1, 1))


GOOD: dict[str, tuple[np.ndarray, CloudForm]] = {
    "meters": (surface(), METERS),
    "missing": (filled(0.6, 0), METERS),
    "NaN": (filled(0.6, np.nan), METERS),
    "infinity": (filled(0.6, (0.1, 0.2, -np.inf)), METERS),
    "millimeters": (1000 * surface(), CloudForm("mm")),
    "centimeters": (100 * surface(), CloudForm("cm")),
    "large": (surface(300, 400), METERS),
    "few points": (filled(0.97, 0), METERS),
    "near": (surface(distance=0.04), METERS),
    "far": (surface(distance=17), METERS),
    "flat": (surface() * 0 + np.dstack([*np.indices((40, 50)) / 100 + 0.1, np.full((40, 50), 0.5)]), METERS),
    "a few behind the camera": (filled(0.005, (0.1, 0.1, -0.2)), METERS),
    "-9999 given": (filled(0.5, -9999), CloudForm(missing_value=-9999)),
    "3e38 given": (filled(0.5, 3e38), CloudForm(missing_value=3e38)),
    "-1 mm given": (filled(0.5, -1, 1000 * surface()), CloudForm("mm", -1)),
    "turned axes": (upside_down(), CloudForm(camera_frame=False)),
    "at the distance of its class": (surface(), CloudForm(distance=0.2)),
    "far wall": (with_wall(0.3, 0.002), METERS),
    "far wall of few levels": (with_wall(0.02, 0.001, step=0.1), METERS),
    "all levels": (with_wall(0, 0, step=0.001), METERS),
    "near, turned axes": (surface(distance=0.01), CloudForm(camera_frame=False)),
    "saturated, given": (with_z(0.05, 65.535), CloudForm(missing_value=65.535)),
    "corner and wall": (filled(0.1, 0) + np.float32(0), METERS),
}

BAD: dict[str, tuple[np.ndarray, CloudForm, str]] = {
    "millimeters": (1000 * surface(), METERS, "--xyz_unit mm or cm"),
    "centimeters": (100 * surface(), METERS, "--xyz_unit mm or cm"),
    "meters as mm": (surface(), CloudForm("mm"), "--xyz_unit m "),
    "micrometers": (1e6 * surface(), METERS, "Convert its coordinates"),
    "unit of another sample": (10 * surface(), CloudForm(distance=0.4), "those of its class 0.4 m"),
    "-9999": (filled(0.5, -9999), METERS, "50% of the pixels of part.tiff hold z = -9999, "),
    "-1 mm": (filled(0.3, -1, 1000 * surface()), CloudForm("mm"), "--missing_value=-1 "),
    "3e38": (filled(0.5, 3e38), METERS, "--missing_value=3"),
    "lowest float": (filled(0.02, -3.4028235e38), METERS, "--missing_value=-3.4028235e+38"),
    "-9999 of another": (filled(0.5, -9999), CloudForm(missing_value=-1), "--missing_value=-9999"),
    "a point behind": (filled(0.2, (0.005, 0.005, -0.7)), METERS, "--missing_value=-0.7 "),
    "z alone -1": (with_z(0.2, -1), METERS, "--missing_value=-1 "),
    "z alone 3e38": (with_z(0.2, 3e38), METERS, "--missing_value=3e+38 "),
    "saturated": (with_z(0.05, 65.535), METERS, "5% of the pixels of part.tiff hold z = 65.535, "),
    "mostly saturated": (with_z(0.7, 10), METERS, "--missing_value=10 "),
    "saturated mm": (1000 * with_z(0.05, 64), CloudForm("mm"), "--missing_value=64000 "),
    "one point": (filled(1, 0.5), METERS, "almost all the same"),
    "one point and holes": (filled(0.5, 0, filled(1, 0.5)), METERS, "almost all the same"),
    "one row": (filled(0.975, 0), METERS, "one row or column"),
    "one column": (filled(0.975, 0).transpose(1, 0, 2), METERS, "one row or column"),
    "one row repeated": (repeated_row(), METERS, "almost all the same"),
    "turned axes": (upside_down(), METERS, "lie behind the camera"),
    "a twentieth behind": (np.where(np.indices((40, 50))[0][..., None] < 2, upside_down(), surface()), METERS, "5% of"),
    "too far": (filled(0.001, (0.1, 101, 1)), METERS, "reach 101 m"),
    "nothing": (filled(1, np.nan), METERS, "has no valid point"),
    "nothing left": (filled(1, -1), CloudForm(missing_value=-1), "has no valid point"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_good_clouds_are_accepted(dtype: type) -> None:
    for name, (xyz, form) in GOOD.items():
        cloud = checked_cloud(name, xyz.astype(dtype), form)
        assert cloud.dtype == np.float32 and cloud.shape == xyz.shape
        assert np.isfinite(cloud).all() and cloud.any(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bad_clouds_are_refused(dtype: type) -> None:
    for name, (xyz, form, expected) in BAD.items():
        with pytest.raises(InputError) as error:
            checked_cloud("part.tiff", xyz.astype(dtype), form)
        assert expected in str(error.value), (name, str(error.value))
        assert "part.tiff" in str(error.value) and str(error.value).endswith(".")


def test_a_large_cloud_is_checked_in_milliseconds() -> None:
    flat = np.full((800, 800, 3), 0.5, np.float32)
    for xyz, good in ((surface(800, 800), True), (flat, False)):
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            if good:
                checked_cloud("a", xyz)
            else:
                with pytest.raises(InputError):
                    checked_cloud("a", xyz)
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 0.2


clouds = st.builds(
    surface,
    height=st.integers(12, 150),
    width=st.integers(12, 150),
    distance=st.floats(0.05, 5),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None)
@given(clouds, st.sampled_from(sorted(UNITS)), st.floats(0, 0.9), st.sampled_from([0.0, np.nan, np.inf, -9999.0]))
def test_every_unit_gives_the_same_meters(xyz: np.ndarray, unit: str, share: float, missing: float) -> None:
    stored = filled(share, missing, xyz / np.float32(UNITS[unit]))
    form = CloudForm(unit, missing if missing == -9999 else None)
    expected = filled(share, 0, xyz.copy())
    np.testing.assert_allclose(checked_cloud("a", stored, form), expected, rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(clouds, st.floats(0.03, 0.9), st.floats(-(2.0**126), -(2.0**-10), width=32), st.integers(0, 9))
def test_a_value_behind_the_camera_in_many_pixels_is_named(
    xyz: np.ndarray, share: float, value: float, seed: int
) -> None:
    mask = np.random.default_rng(seed).permutation(xyz[..., 0].size) < np.ceil(share * xyz[..., 0].size)
    xyz.reshape(-1, 3)[mask] = value
    with pytest.raises(InputError, match="--missing_value=") as error:
        checked_cloud("a", xyz)
    named = float(str(error.value).split("--missing_value=")[1].split()[0])
    left = checked_cloud("a", xyz, CloudForm(missing_value=named))
    assert not left.reshape(-1, 3)[mask].any() and left.reshape(-1, 3)[~mask].all()


@settings(max_examples=25, deadline=None)
@given(clouds, st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_a_wrong_unit_is_refused_or_in_range(xyz: np.ndarray, stored: str, given_unit: str) -> None:
    try:
        cloud = checked_cloud("a", xyz / np.float32(UNITS[stored]), CloudForm(given_unit))
    except InputError as error:
        assert stored != given_unit
        assert "xyz_unit" in str(error)
    else:
        assert 0.031 <= np.median(np.linalg.norm(cloud.reshape(-1, 3), axis=1)) <= 21  # of a sample of its pixels


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=5 * 4 * 12, max_size=5 * 4 * 12))
def test_any_bytes_are_a_cloud_or_refused_in_one_sentence(content: bytes) -> None:
    xyz = np.frombuffer(content, np.float32).reshape(5, 4, 3)
    try:
        cloud = checked_cloud("a", xyz)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(cloud).all() and np.abs(cloud).max() <= 100


@pytest.mark.parametrize("side", [60, 200])
def test_missing_values_in_stripes_are_found(side: int) -> None:
    """Regular patterns of missing pixels are found in a random sample of the points."""
    assert 60**2 <= DRAWN < 200**2
    for stripes in (np.s_[::2], np.s_[1::2], np.s_[:, ::8], np.s_[3::16, 3::4]):
        xyz = surface(side, side)
        xyz[stripes] = -9999
        with pytest.raises(InputError, match="--missing_value=-9999"):
            checked_cloud("a", xyz)


@pytest.mark.parametrize("bad", ["millimeters", "-9999", "one point", "turned axes"])
def test_make_sample_refuses_bad_clouds(bad: str) -> None:
    xyz, _, expected = BAD[bad]
    with pytest.raises(InputError, match=r"part\.tiff") as error:
        make_sample("part.tiff", None, xyz, 8)
    assert expected in str(error.value)


def test_goldens_and_real_scans_are_accepted(goldens: Path, real_data: Path) -> None:
    paths = [*goldens.rglob("*.tiff"), *(real_data / "scans/xyz").glob("*.tiff")]
    assert len(paths) > 10
    for path in paths:
        xyz = read_organized_pc(path)
        np.testing.assert_array_equal(checked_cloud(path, xyz), xyz)


# Forms of a dataset


def write_split(root: Path, distances: list[float]) -> list[SampleFiles]:
    files = []
    for i, distance in enumerate(distances):
        path = root / f"bracket/train/good/xyz/{i:03d}.tiff"
        write_organized_pc(path, surface(distance=distance, seed=i))
        files.append(SampleFiles(f"train/good/{i:03d}", xyz=path))
    return files


def test_a_class_has_the_median_distance_of_its_clouds(tmp_path: Path) -> None:
    files = write_split(tmp_path, [0.4, 0.5, 0.9])
    assert class_distance(files) == pytest.approx(0.5, rel=0.1)
    assert class_distance([]) is None
    write_organized_pc(files[1].xyz, 0 * surface())  # reported when it is used
    assert class_distance(files[1:2]) is None


@pytest.mark.parametrize("odd", [0, 2])
def test_the_sample_in_another_unit_is_named(tmp_path: Path, odd: int) -> None:
    distances = [0.1, 0.1, 0.1]
    distances[odd] = 10.0  # centimeters
    files = write_split(tmp_path, distances)
    report = check_split(
        tmp_path / "bracket", "train", frozenset({"xyz"}), 0, CloudForm(distance=class_distance(files))
    )
    assert len(report.problems) == 1
    assert f"{odd:03d}.tiff is 10" in report.problems[0] and "those of its class" in report.problems[0]


def forms_flags(root: Path, **given: object) -> argparse.Namespace:
    defaults = {"dataset_path": root, "dataset_type": "mvtec3d", "xyz_unit": "m", "missing_value": None}
    return argparse.Namespace(**defaults | given)


def test_forms_of_a_dataset(tmp_path: Path) -> None:
    assert dataset_forms(forms_flags(tmp_path)) == (METERS, METERS)
    millimeters = CloudForm("mm", -1.0)
    assert dataset_forms(forms_flags(tmp_path, xyz_unit="mm", missing_value=-1.0)) == (millimeters, millimeters)
    turned = CloudForm(camera_frame=False)
    assert dataset_forms(forms_flags(tmp_path, dataset_type="eyecandies")) == (turned, turned)
    manifest = {"schema": 1, "unit": "m", "settings": {"xyz_unit": "mm", "missing_value": -1.0}}
    manifest["scans"] = {"bagel/train/good/000": {}}
    (tmp_path / "preprocessing.json").write_text(json.dumps(manifest))
    assert dataset_forms(forms_flags(tmp_path)) == (METERS, millimeters)
    for flag in ({"xyz_unit": "mm"}, {"missing_value": -1.0}):
        with pytest.raises(InputError, match=r"is preprocessed .* Leave out --xyz_unit"):
            dataset_forms(forms_flags(tmp_path, **flag))
    del manifest["unit"]  # of an older version
    (tmp_path / "preprocessing.json").write_text(json.dumps(manifest | {"settings": {"converter": "eyecandies"}}))
    assert dataset_forms(forms_flags(tmp_path)) == (turned, turned)


# The check in each script


def store(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    for path in root.rglob("xyz/*"):
        write_organized_pc(path, change(read_organized_pc(path)))
    return root


def in_millimeters(xyz: np.ndarray) -> np.ndarray:
    """The cloud in millimeters, with -9999 in a corner."""
    xyz = 1000 * xyz
    xyz[:8, :12] = -9999
    return xyz


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (main_script.main, ["--method_name", "Point_MAE", "--xyz_backbone_name", "FPFH", "--output_dir", "out"]),
        (main_script.main, ["--inspect_dataset"]),
        (preprocessing.main, ["--dry_run"]),
        (preprocessing.main, []),
    ],
    ids=["main", "inspect", "dry run", "preprocessing"],
)
def test_each_script_names_the_missing_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], int | None], flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store(write_bagels(tmp_path / "data"), in_millimeters)
    place = ["data"] if main is preprocessing.main else ["--dataset_path", "data"]
    done = call_script(main, *place, *flags, "--xyz_unit", "mm")
    assert done.returncode in (1, 2)
    assert "--missing_value=-9999" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_preprocessing_writes_meters_and_says_so(tmp_path: Path) -> None:
    flags = ["--xyz_unit", "mm", "--missing_value=-9999"]
    scans = store(write_dataset(tmp_path / "raw"), in_millimeters)
    expected = store(write_dataset(tmp_path / "meters"), lambda xyz: in_millimeters(xyz).clip(0) / np.float32(1000))
    assert call_script(preprocessing.main, scans, *flags).returncode == 0
    assert call_script(preprocessing.main, expected).returncode == 0
    for path in scans.rglob("*.tiff"):
        np.testing.assert_allclose(
            read_organized_pc(path), read_organized_pc(expected / path.relative_to(scans)), rtol=1e-6
        )
    manifest = json.loads((scans / "preprocessing.json").read_text())
    assert (manifest["unit"], manifest["settings"]["xyz_unit"]) == ("m", "mm")
    assert dataset_forms(forms_flags(scans))[1] == CloudForm("mm", -9999)
    again = call_script(preprocessing.main, scans, *flags)
    assert again.returncode == 0 and "skipped 3" in again.stdout
    assert "xyz_unit" not in (expected / "preprocessing.json").read_text()


@pytest.mark.parametrize("place", [[], ["--output_dir", "out"]], ids=["in place", "elsewhere"])
def test_flags_that_the_messages_advise_are_accepted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store(write_dataset(Path("raw")), in_millimeters)
    flags: list[str] = []
    for flag in ("--missing_value=-9999", "--xyz_unit mm"):
        refused = call_script(preprocessing.main, "raw", "--workers", 1, *place, *flags)
        assert refused.returncode == 1 and refused.stdout.count(flag) == 3
        flags += flag.split()
        assert dataset_forms(forms_flags(Path("raw"), xyz_unit="mm"))[0] == CloudForm("mm")
    assert call_script(preprocessing.main, "raw", "--workers", 1, *place, *flags).returncode == 0
    other = call_script(preprocessing.main, "raw", "--workers", 1, *place, "--xyz_unit", "mm")
    assert "with missing_value -9999.0 (now not given). Use" in other.stderr


def test_dataset_refused_in_place_is_cleaned_into_another_folder(tmp_path: Path) -> None:
    root = store(write_dataset(tmp_path / "raw"), in_millimeters)
    assert call_script(preprocessing.main, root, "--workers", 1).returncode == 1
    flags = ("--xyz_unit", "mm", "--missing_value=-9999", "--output_dir", tmp_path / "out")
    assert call_script(preprocessing.main, root, "--workers", 1, *flags).returncode == 0


def test_scan_that_preprocessing_left_out_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = store(write_dataset(tmp_path / "data"), lambda xyz: 1000 * xyz)
    bad = sorted(root.glob("bagel/train/good/rgb/*"))[0]
    bad.write_bytes(bad.read_bytes()[:50])
    assert call_script(preprocessing.main, root, "--workers", 1, "--xyz_unit", "mm").returncode == 1
    flags = ["--method_name", "Point_MAE", "--xyz_backbone_name", "FPFH", "--output_dir", tmp_path / "out"]
    failed = call_script(main_script.main, "--dataset_path", root, *flags)
    assert failed.returncode == 2 and "--xyz_unit mm" in failed.stderr
    assert "were not preprocessed like the others" in caplog.text
    failed = call_script(main_script.main, "--dataset_path", root, *flags, "--xyz_unit", "mm")
    assert "Leave out --xyz_unit and --missing_value, or preprocess the remaining samples." in failed.stderr


@pytest.mark.parametrize("place", [[], ["--output_dir", "out"]], ids=["in place", "elsewhere"])
def test_preprocessing_refuses_the_scan_in_another_unit_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store(write_dataset(Path("raw")), lambda xyz: 1000 * xyz)
    odd = Path("raw/bagel/train/good/xyz/001.tiff")
    xyz = read_organized_pc(odd) / 10
    xyz[14:28, 14:30, 2] -= 10  # high enough to be left after cleaning
    write_organized_pc(odd, xyz)
    before = odd.read_bytes()
    for flags in (["--dry_run"], [], []):
        refused = call_script(preprocessing.main, "raw", *place, "--xyz_unit", "mm", "--workers", 1, *flags)
        assert refused.returncode == 1 and "failed 1" in refused.stdout
        assert f"The median point of {odd} is 0.0" in refused.stdout and "those of its class 0." in refused.stdout
        assert odd.read_bytes() == before


def test_help_names_the_source_of_the_default_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    described = " ".join(capsys.readouterr().out.split())
    assert "saved detector; sets defaults of --xyz_unit and --missing_value" in described
