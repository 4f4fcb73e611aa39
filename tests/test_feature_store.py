"""Patch files: positions after resize and pairing, round trips at both precisions, and damaged folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from uff_runs import BACKBONES, write_original

from utils.errors import InputError
from utils.feature_store import PatchFileDataset, pair_rgb, read_header, resize_patches, write_features
from utils.records import PatchFeatures


def coordinates(side: int) -> Tensor:
    """Patches that hold their own row and column, (side**2, 2)."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([row.flatten(), column.flatten()], dim=1).float()


def random_features(seed: int = 0, xyz_dim: int = 5, rgb_dim: int = 3) -> PatchFeatures:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.randn(16, xyz_dim, generator=generator)
    xyz[3] = 0.0
    return PatchFeatures(rgb=torch.randn(4, rgb_dim, generator=generator), xyz=xyz)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Patch files of two classes, written out of order."""
    for class_name, stem, seed in [("dowel", "001", 3), ("dowel", "000", 2), ("bagel", "010", 1), ("bagel", "002", 0)]:
        write_features(tmp_path, class_name, stem, random_features(seed), **BACKBONES)
    return tmp_path


def test_upsampling_repeats_the_patch_of_each_place() -> None:
    assert torch.equal(resize_patches(coordinates(28), 56), coordinates(56) // 2)


def test_downsampling_averages_patches() -> None:
    assert torch.equal(resize_patches(coordinates(4), 2), coordinates(2) * 2 + 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("side", "grid"), [(1, 3), (3, 3), (3, 4), (5, 2)])
def test_resize_equals_the_plain_form(side: int, grid: int, dtype: torch.dtype) -> None:
    patches = torch.randn(side * side, 2).to(dtype)
    resized = resize_patches(patches, grid)
    plane = patches.double().reshape(side, side, 2)
    bounds = [(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    expected = [plane[top:bottom, left:right].mean(dim=(0, 1)) for top, bottom in bounds for left, right in bounds]
    assert resized.dtype == dtype
    torch.testing.assert_close(resized.double(), torch.stack(expected), atol=2e-3, rtol=0)


def test_patches_of_no_square_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="12 patches"):
        resize_patches(torch.ones(12, 2), 4)


def test_aligned_pairs_are_at_the_same_place() -> None:
    assert torch.equal(pair_rgb(coordinates(28), 3136), coordinates(56) // 2)


def test_reference_pairs_follow_the_original_order() -> None:
    paired = pair_rgb(torch.arange(784.0)[:, None], 3136, "reference")[:, 0]
    for j in range(4):
        for i in range(784):
            assert paired[784 * j + i] == (4 * i + j) % 784


def test_reference_pairs_of_other_grids() -> None:
    paired = pair_rgb(torch.arange(4.0)[:, None], 16, "reference")[:, 0]
    assert paired.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(InputError, match="not a multiple of"):
        pair_rgb(torch.ones(9, 1), 16, "reference")


@pytest.mark.golden
def test_both_pairings_equal_the_original(goldens: Path) -> None:
    stages = np.load(goldens / "stages_bagel_test_hole_000.npz")
    tokens = torch.full((784, stages["vit_s"].shape[1]), torch.nan)  # every 12th is recorded
    tokens[::12] = torch.from_numpy(stages["vit_s"])
    scrambled = pair_rgb(tokens, 3136, "reference")[::25, :8]
    aligned = pair_rgb(tokens, 3136, "aligned")[::49]
    for ours, name in [(scrambled, "saved_patch_rgbpart_first8cols_s"), (aligned, "rgb_patch2_s")]:
        recorded, known = torch.from_numpy(stages[name]), ~ours.isnan().any(dim=1)
        assert known.sum() >= 4
        torch.testing.assert_close(ours[known], recorded[known], rtol=0, atol=1e-6)


def test_single_precision_round_trip_is_exact(tmp_path: Path) -> None:
    features = random_features()
    path = write_features(tmp_path, "bagel", "007", features, **BACKBONES, dtype=torch.float32)
    assert path == tmp_path / "bagel" / "007.safetensors"
    dataset = PatchFileDataset(tmp_path)
    xyz, rgb, index = dataset[0]
    assert index == 0
    assert torch.equal(xyz, features.xyz)
    assert torch.equal(rgb, resize_patches(features.rgb, 4))
    assert (dataset.xyz_dim, dataset.rgb_dim, len(dataset)) == (5, 3, 1)


def test_half_precision_is_the_default_and_halves_the_file(tmp_path: Path) -> None:
    features = random_features()
    assert load_file(write_features(tmp_path, "bagel", "007", features, **BACKBONES))["xyz"].dtype == torch.float16
    xyz, _, _ = PatchFileDataset(tmp_path)[0]
    assert xyz.dtype == torch.float32
    torch.testing.assert_close(xyz, features.xyz, rtol=1e-3, atol=1e-6)


def test_a_half_precision_file_is_at_most_two_fifths_of_the_original(tmp_path: Path) -> None:
    """The original stores each rgb patch four times, in single precision: 3136 x 1920 x 4 bytes."""
    features = PatchFeatures(rgb=torch.zeros(784, 768), xyz=torch.zeros(3136, 1152))
    sizes = [
        write_features(tmp_path, "bagel", stem, features, **BACKBONES, dtype=dtype).stat().st_size
        for stem, dtype in (("000", torch.float16), ("001", torch.float32))
    ]
    assert sizes[0] <= 0.4 * 3136 * 1920 * 4
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saving_keeps_exact_zeros_and_adds_none(tmp_path: Path, dtype: torch.dtype) -> None:
    features = random_features()
    features.xyz[0, :4] = torch.tensor([1e-12, -1e-12, 0.0, -0.0])
    write_features(tmp_path, "bagel", "000", features, **BACKBONES, dtype=dtype)
    xyz, _, _ = PatchFileDataset(tmp_path)[0]
    assert torch.equal(xyz == 0, features.xyz == 0)
    assert torch.equal(xyz.sign(), features.xyz.sign())
    assert xyz[0, :2].abs().max() < 1e-7


def test_files_are_sorted_by_class_and_stem(folder: Path) -> None:
    (folder / "bagel" / ".000.42.tmp.safetensors").write_bytes(b"half a file")  # being written
    dataset = PatchFileDataset(folder)
    assert [(f.class_name, f.stem) for f in dataset.files] == [
        *(("bagel", "002"), ("bagel", "010"), ("dowel", "000"), ("dowel", "001")),
    ]
    torch.testing.assert_close(dataset[1][0], random_features(1).xyz, rtol=1e-3, atol=1e-6)


def test_the_header_describes_the_file(folder: Path) -> None:
    path = folder / "bagel" / "002.safetensors"
    assert read_header(path)._asdict() == {
        **{"path": path, "class_name": "bagel", "stem": "002", "xyz_dim": 5, "rgb_dim": 3, "xyz_grid": 4},
        **{"rgb_grid": 2, "pairing": "aligned", **BACKBONES},
    }
    with safe_open(path, framework="pt") as file:
        assert json.loads(json.dumps(file.metadata()))["schema"] == "m3dm-patches/1"


def test_pairing_is_chosen_by_name(folder: Path) -> None:
    aligned, scrambled = PatchFileDataset(folder)[0][1], PatchFileDataset(folder, "reference")[0][1]
    rgb = load_file(folder / "bagel" / "002.safetensors")["rgb"].float()
    assert torch.equal(aligned, rgb[[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]])
    assert torch.equal(scrambled, pair_rgb(rgb, 16, "reference"))
    for call in (lambda: PatchFileDataset(folder, "random")[0], lambda: pair_rgb(rgb, 16, "random")):
        with pytest.raises(InputError, match="aligned, reference"):
            call()


def test_the_default_pairing_is_the_one_in_the_files(tmp_path: Path) -> None:
    features = random_features()
    write_features(tmp_path, "bagel", "000", features, **BACKBONES, pairing="reference", dtype=torch.float32)
    default, overridden = PatchFileDataset(tmp_path), PatchFileDataset(tmp_path, "aligned")
    assert torch.equal(default[0][1], pair_rgb(features.rgb, 16, "reference"))
    assert torch.equal(overridden[0][1], pair_rgb(features.rgb, 16, "aligned"))
    write_features(tmp_path, "bagel", "001", features, **BACKBONES, pairing="aligned", dtype=torch.float32)
    with pytest.raises(InputError, match="pairing"):
        PatchFileDataset(tmp_path)


def test_batches_have_equal_shapes(folder: Path) -> None:
    xyz, rgb, indices = next(iter(DataLoader(PatchFileDataset(folder), batch_size=4)))
    assert indices.tolist() == [0, 1, 2, 3]
    assert xyz.shape == (4, 16, 5)
    assert rgb.shape == (4, 16, 3)


@pytest.mark.parametrize(("made", "message"), [(False, "not a folder"), (True, "holds no <class>/<stem>.safetensors")])
def test_a_folder_without_files_is_refused(tmp_path: Path, made: bool, message: str) -> None:
    folder = tmp_path / "lib"
    if made:
        folder.mkdir()
    with pytest.raises(InputError, match=message):
        PatchFileDataset(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "dowel" / "000.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"dowel/000\.safetensors.*truncated"):
        PatchFileDataset(folder)


def test_a_file_that_vanishes_is_named(folder: Path) -> None:
    dataset = PatchFileDataset(folder)
    dataset.files[0].path.unlink()
    with pytest.raises(InputError, match=r"bagel/002\.safetensors can no longer be read"):
        dataset[0]


@pytest.mark.parametrize(
    ("features", "backbones"),
    [
        (random_features(xyz_dim=6), BACKBONES),
        (random_features(rgb_dim=4), BACKBONES),
        (PatchFeatures(rgb=torch.ones(9, 3), xyz=torch.ones(16, 5)), BACKBONES),
        (random_features(), BACKBONES | {"xyz_backbone": "Point_Bert"}),
    ],
)
def test_files_of_different_runs_are_refused(folder: Path, features: PatchFeatures, backbones: dict[str, str]) -> None:
    write_features(folder, "tire", "000", features, **backbones)
    with pytest.raises(InputError, match=r"differ in .*bagel/002\.safetensors has .*tire/000\.safetensors has"):
        PatchFileDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "m3dm-patches/0"}, "has schema 'm3dm-patches/0', not 'm3dm-patches/1'"),
        ({"schema": None}, "has schema None"),
        ({"xyz_grid": "five"}, "incomplete metadata"),
        ({"stem": None}, "incomplete metadata.*stem"),
        ({"rgb_dim": "7"}, r"holds .*\(4, 3\).* but its metadata say .*\(4, 7\)"),
    ],
)
def test_wrong_metadata_are_refused(folder: Path, change: dict[str, str | None], message: str) -> None:
    path = folder / "bagel" / "002.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | change
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(InputError, match=message):
        PatchFileDataset(folder)


@pytest.mark.parametrize("modality", ["xyz", "rgb"])
def test_rows_that_are_not_finite_are_counted(folder: Path, modality: str) -> None:
    path = folder / "bagel" / "002.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[modality][1, :2] = torch.nan
    tensors[modality][2, 0] = torch.inf
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=rf"bagel/002\.safetensors: 2 of \d+ {modality} patches hold NaN or infinite"):
        PatchFileDataset(folder)[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_bad_values_are_refused_before_a_file_is_written(tmp_path: Path, value: float) -> None:
    features = random_features()
    features.rgb[2, 1] = value
    with pytest.raises(InputError, match="1 of 4 rgb patches"):
        write_features(tmp_path, "bagel", "000", features, **BACKBONES)
    assert not list(tmp_path.rglob("*"))
    if value == 1e6:  # too large for half precision only
        write_features(tmp_path, "bagel", "000", features, **BACKBONES, dtype=torch.float32)


def test_one_modality_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks rgb or xyz"):
        write_features(tmp_path, "bagel", "000", random_features()._replace(rgb=None), **BACKBONES)


# The .pt files of the original code


def grid_features(seed: int = 0) -> PatchFeatures:
    """Random features of 8 x 8 xyz and 4 x 4 rgb patches, with background."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.randn(64, 12, generator=generator)
    xyz[:8] = 0.0
    return PatchFeatures(rgb=torch.randn(16, 10, generator=generator), xyz=xyz)


def original_folder(folder: Path, names: Sequence[str] = ("bagel0", "bagel1", "cable_gland10")) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        write_original(folder, name, grid_features(seed))
    return folder


@pytest.mark.parametrize("xyz_dim", [None, 12])
@pytest.mark.parametrize("pairing", [None, "aligned", "reference"])
def test_files_of_the_original_give_the_same_rows(tmp_path: Path, pairing: str | None, xyz_dim: int | None) -> None:
    theirs = PatchFileDataset(original_folder(tmp_path / "theirs"), pairing, xyz_dim=xyz_dim)
    for seed in range(3):
        write_features(tmp_path / "ours", "a", str(seed), grid_features(seed), **BACKBONES, dtype=torch.float32)
    ours = PatchFileDataset(tmp_path / "ours", pairing)
    assert (theirs.xyz_dim, theirs.rgb_dim, len(theirs)) == (12, 10, 3)
    assert [(file.class_name, file.stem, file.xyz_grid, file.rgb_grid) for file in theirs.files] == [
        *(("bagel", "0", 8, 4), ("bagel", "1", 8, 4), ("cable_gland", "10", 8, 4)),
    ]
    for index in range(3):
        for found, expected in zip(theirs[index][:2], ours[index][:2], strict=True):
            assert torch.equal(found, expected)
        assert theirs[index][2] == index


def test_rgb_patches_of_the_original_are_returned_to_their_places(tmp_path: Path) -> None:
    """With patch coordinates as features, rgb patches in a file of the original get back to their places."""
    xyz = coordinates(56) + 1
    xyz[:56] = 0.0
    write_original(tmp_path, "bagel0", PatchFeatures(rgb=coordinates(28) + 1, xyz=xyz))
    found, rgb, _ = PatchFileDataset(tmp_path)[0]
    assert torch.equal(found, xyz)
    assert torch.equal(rgb - 1, coordinates(56) // 2)


def test_the_xyz_width_is_required_if_no_background_shows_it(tmp_path: Path) -> None:
    features = grid_features()
    features.xyz[:8] = 1.0
    write_original(tmp_path, "bagel0", features)
    with pytest.raises(InputError, match=r"^\S*bagel0\.pt does not show the width of its xyz .*--xyz_dim\.$"):
        PatchFileDataset(tmp_path)
    found, rgb, _ = PatchFileDataset(tmp_path, xyz_dim=12)[0]
    assert torch.equal(found, features.xyz)
    assert torch.equal(rgb, resize_patches(features.rgb, 8))


def test_the_xyz_width_is_required_if_background_rows_disagree(tmp_path: Path) -> None:
    features = grid_features()
    features.xyz[20, :3] = 0.0  # a patch with points that happens to start with zeros
    write_original(tmp_path, "bagel0", features)
    with pytest.raises(InputError, match="Give it as --xyz_dim"):
        PatchFileDataset(tmp_path)
    assert PatchFileDataset(tmp_path, xyz_dim=12).xyz_dim == 12


@pytest.mark.parametrize("xyz_dim", [22, 23, 11, 13])
def test_a_wrong_width_is_refused(tmp_path: Path, xyz_dim: int) -> None:
    """Background rows show that a width is too small or too large."""
    with pytest.raises(InputError, match=rf"^\S*bagel0\.pt [^\n]*--xyz_dim {xyz_dim}[^\n]*$"):
        PatchFileDataset(original_folder(tmp_path), xyz_dim=xyz_dim)


class Attack:
    """Object that ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(63, 22), r"holds \(63, 22\), not a tensor \(patches of a square grid"),
        (torch.ones(2, 4, 22), r"holds \(2, 4, 22\), not"),
        ({"patch": torch.ones(64, 22)}, r"holds dict, not"),
        ([1, 2], r"holds list, not"),
        (Attack(), r"is refused: it holds a (builtins\.)?exec"),
        (b"", "cannot be read"),
        (b"half", "cannot be read|is refused"),
        (torch.zeros(0, 22), r"\(0, 22\)"),
    ],
    ids=["no square", "3 axes", "dict", "list", "pickle", "empty file", "no pickle", "no patch"],
)
def test_a_pt_file_that_is_not_of_the_original_is_refused(
    tmp_path: Path, content: object, message: str, place: int
) -> None:
    """Such a file is refused as the first one, which sets the widths, and as a later one."""
    path = original_folder(tmp_path) / f"bagel{place}.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=rf"^{path} [^\n]*({message})[^\n]*$"):
        PatchFileDataset(tmp_path, xyz_dim=12)[place]


@pytest.mark.parametrize("kept", [5, 1000, -1, -500])
def test_a_truncated_file_of_the_original_is_named(tmp_path: Path, kept: int) -> None:
    path = original_folder(tmp_path) / "bagel1.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"^{path} [^\n]*$"):
        PatchFileDataset(tmp_path)[1]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (PatchFeatures(rgb=torch.randn(16, 11), xyz=torch.randn(64, 12)), r"the first file \(64, 22\)"),
        (PatchFeatures(rgb=torch.randn(4, 10), xyz=torch.randn(16, 12)), r"the first file \(64, 22\)"),
        (PatchFeatures(rgb=torch.randn(4, 10), xyz=torch.randn(64, 12)), "has another rgb grid than the first file"),
    ],
)
def test_files_of_the_original_of_different_shapes_are_refused(
    tmp_path: Path, features: PatchFeatures, message: str
) -> None:
    write_original(original_folder(tmp_path), "bagel1", features)
    with pytest.raises(InputError, match=rf"^\S*bagel1\.pt [^\n]*{message}[^\n]*$"):
        PatchFileDataset(tmp_path)[1]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("modality", ["xyz", "rgb"])
def test_rows_of_the_original_that_are_not_finite_are_counted(tmp_path: Path, modality: str, place: int) -> None:
    features = grid_features(place)
    getattr(features, modality)[9, 2] = torch.nan
    write_original(original_folder(tmp_path), f"bagel{place}", features)
    with pytest.raises(InputError, match=rf"bagel{place}\.pt: \d+ of \d+ {modality} patches hold NaN or infinite"):
        PatchFileDataset(tmp_path)[place]


def test_both_formats_in_one_folder_are_refused(folder: Path) -> None:
    original_folder(folder)
    with pytest.raises(InputError, match=r"holds 4 patch files and 3 \.pt files of the original code\. Keep them"):
        PatchFileDataset(folder)
