"""The patch files that Unsupervised Feature Fusion (UFF) is trained on: the one owner of their format.

One safetensors file per good training sample, <save_feature_path>/<class>/<stem>.safetensors:

    xyz  (xyz_grid**2, C_xyz)   row-major over its grid, float16 or float32
    rgb  (rgb_grid**2, C_rgb)   on the grid of its own backbone; it is brought to the xyz grid when it is read

and the fields of `PatchFile` but the path as metadata, beside a schema version.

Zeros carry meaning: training leaves out every patch whose xyz features hold an exact zero. Half precision would turn
tiny values into further zeros, so the writer keeps such a value at the smallest number that half precision has (6e-8).
The zeros of a file are therefore exactly the zeros of the features, at either precision.

The patch files of the original code can be read too: <class><number>.pt, one float32 tensor (n, C_xyz + C_rgb) each, in
which the rgb patches were brought to the xyz grid in the scrambled order of the "reference" pairing.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from utils.checkpoint_files import read_checkpoint
from utils.choices import PAIRINGS, STORAGE_DTYPE_NAMES
from utils.errors import InputError
from utils.records import PatchFeatures
from utils.scans.files import atomic_path

SCHEMA = "m3dm-patches/1"
SUFFIX, ORIGINAL_SUFFIX = ".safetensors", ".pt"
STORAGE_DTYPES = dict(zip(STORAGE_DTYPE_NAMES, (torch.float16, torch.float32), strict=True))
MEND = "write the patch files anew with main.py --save_feature"


class PatchFile(NamedTuple):
    """What the header of one patch file says."""

    path: Path
    class_name: str
    stem: str  # of the scan, "000"
    xyz_dim: int  # C_xyz
    rgb_dim: int  # C_rgb
    xyz_grid: int  # patches along a side
    rgb_grid: int
    xyz_backbone: str
    rgb_backbone: str
    pairing: str  # that the writer asks training for, see `pair_rgb`

    @property
    def layout(self) -> tuple[int | str, ...]:
        """What the files of one training run have in common."""
        return self[3:]


def grid_side(patches: Tensor) -> int:
    """Side of the square grid that (n, C) patches lie on; ValueError when n is no square."""
    side = math.isqrt(len(patches))
    if side**2 != len(patches):
        raise ValueError(f"{len(patches)} patches do not fill a square grid")
    return side


def resize_patches(patches: Tensor, grid: int) -> Tensor:
    """Bring patches to another grid by adaptive average pooling; a multiple of the grid (28 -> 56) replicates them.

    Args:
        patches: (n, C), row-major over a square grid, float.
        grid: patches along a side of the new grid.

    Returns:
        (grid**2, C), row-major, dtype and device of the input.
    """
    side = grid_side(patches)
    plane = patches.T.reshape(1, -1, side, side)
    return F.adaptive_avg_pool2d(plane, grid)[0].flatten(1).T.contiguous()  # (1, C, grid, grid) -> (grid**2, C)


def pair_rgb(rgb: Tensor, rows: int, pairing: str = "aligned") -> Tensor:
    """The rgb partner of every xyz patch.

    Args:
        rgb: (n, C_rgb), row-major over the rgb grid.
        rows: number of xyz patches, a square.
        pairing: "aligned" gives the patch of the same place. "reference" keeps an oddity of the original training
            data, whose resize scrambled the order: with r = rows / n, row n * j + i holds patch (r * i + j) mod n.

    Returns:
        (rows, C_rgb).
    """
    if pairing == "aligned":
        return resize_patches(rgb, math.isqrt(rows))
    if pairing != "reference":
        raise InputError(f"unknown pairing {pairing!r}: expected one of {', '.join(PAIRINGS)}")
    n = len(rgb)
    if rows % n:
        raise InputError(f"the reference pairing needs a whole number of xyz patches per rgb patch, not {rows} / {n}")
    i, j = torch.arange(rows) % n, torch.arange(rows) // n
    return rgb[(rows // n * i + j) % n]


def write_features(
    folder: Path | str,
    class_name: str,
    stem: str,
    features: PatchFeatures,
    *,
    xyz_backbone: str,
    rgb_backbone: str,
    pairing: str = "aligned",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the patches of one training sample, whole or not at all.

    Args:
        folder: what --save_feature_path names; the class folder is made in it.
        features: xyz (xyz_grid**2, C_xyz) and rgb (rgb_grid**2, C_rgb); fusion is not stored.
        pairing: what a reader uses that does not choose itself, see `pair_rgb`; both modalities are stored as they are.
        dtype: torch.float16 or torch.float32.

    Returns:
        The path of the file.

    Raises:
        InputError: a modality is absent, or holds values that are not finite in this dtype.
    """
    if dtype not in STORAGE_DTYPES.values():
        raise ValueError(f"patch files hold float16 or float32, not {dtype}")
    if features.xyz is None or features.rgb is None:
        raise InputError(f"{class_name}/{stem}: training features need both rgb and xyz: save them with DINO+Point_MAE")
    path = Path(folder) / class_name / f"{stem}{SUFFIX}"
    tensors = {
        name: to_storage(patches.detach(), dtype).cpu().contiguous()
        for name, patches in (("xyz", features.xyz), ("rgb", features.rgb))
    }
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    header = PatchFile(
        path,
        class_name,
        stem,
        features.xyz.shape[1],
        features.rgb.shape[1],
        grid_side(features.xyz),
        grid_side(features.rgb),
        xyz_backbone,
        rgb_backbone,
        pairing,
    )
    metadata = {key: str(value) for key, value in header._asdict().items() if key != "path"}
    with atomic_path(path) as temporary:
        # By way of bytes: save_file makes files that nobody but their owner may read.
        temporary.write_bytes(save(tensors, metadata | {"schema": SCHEMA}))
    return path


def read_header(path: Path) -> PatchFile:
    """Read and check the header of a patch file without reading its patches.

    Raises:
        InputError: the file is cut off, is of another schema, or contradicts its own metadata.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is cut off or no patch file; {MEND}") from None
    if metadata.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {metadata.get('schema')!r}, expected {SCHEMA!r}; {MEND}")
    try:
        numbers = {key: int(metadata[key]) for key in ("xyz_dim", "rgb_dim", "xyz_grid", "rgb_grid")}
        names = {key: metadata[key] for key in ("class_name", "stem", "xyz_backbone", "rgb_backbone", "pairing")}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has incomplete metadata ({error}); {MEND}") from None
    header = PatchFile(path=path, **names, **numbers)  # type: ignore[arg-type]  # the two dicts differ in value type
    expected = {
        "xyz": (header.xyz_grid**2, header.xyz_dim),
        "rgb": (header.rgb_grid**2, header.rgb_dim),
    }
    if shapes != expected:
        raise InputError(f"{path} holds {shapes}, but its metadata say {expected}; {MEND}")
    return header


class PatchFileDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """The patch files of a folder, sorted by class and stem, as pairs of patches of one sample.

    An item is (xyz (xyz_grid**2, C_xyz), rgb (xyz_grid**2, C_rgb), index): row by row the xyz patch and its rgb
    partner, and the index of the item, by which `files` tells where it comes from.

    Args:
        folder: what --save_feature_path named; holds one folder per class, or the .pt files of the original code.
        pairing: "aligned" or "reference", see `pair_rgb`; None: what the files ask for ("aligned" for .pt files).
        dtype: dtype of the items.
        xyz_dim: C_xyz of .pt files, which do not say it; None: found from patches without a point, all zero in xyz.

    Raises:
        InputError: no files, a damaged one, or files of different widths, grids or backbones; when an item is read:
            patches that are not finite.
    """

    def __init__(
        self,
        folder: Path | str,
        pairing: str | None = None,
        dtype: torch.dtype = torch.float32,
        xyz_dim: int | None = None,
    ) -> None:
        self.dtype = dtype
        paths = _list_files(Path(folder))
        if paths[0].suffix == ORIGINAL_SUFFIX:
            self.files = _original_headers(paths, xyz_dim)
        else:
            self.files = [read_header(path) for path in paths]
        first = self.files[0]
        for file in self.files:
            if file.layout != first.layout:
                named = ", ".join(PatchFile._fields[3:])
                raise InputError(
                    f"the patch files differ in ({named}): {first.path} has {first.layout}, "
                    f"{file.path} has {file.layout}; keep the files of one run of --save_feature in a folder"
                )
        self.xyz_dim, self.rgb_dim = first.xyz_dim, first.rgb_dim
        self.pairing = pairing or first.pairing
        if self.pairing not in PAIRINGS:
            raise InputError(f"unknown pairing {self.pairing!r}: expected one of {', '.join(PAIRINGS)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        file = self.files[index]
        if file.path.suffix == ORIGINAL_SUFFIX:
            xyz, rgb = (part.to(self.dtype) for part in _read_original(file))
        else:
            xyz, rgb = (part.to(self.dtype) for part in _read_patches(file.path))
        _check_finite(file.path, "xyz", xyz)
        _check_finite(file.path, "rgb", rgb)
        return xyz, pair_rgb(rgb, len(xyz), self.pairing), index


def _read_patches(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("xyz"), file.get_tensor("rgb")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can no longer be read: {error}; {MEND}") from None


def _list_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the folder that main.py --save_feature_path wrote")
    # A leading dot marks a file that is being written.
    ours = sorted(path for path in folder.glob(f"*/*{SUFFIX}") if not path.name.startswith("."))
    originals = sorted(folder.glob(f"*{ORIGINAL_SUFFIX}"))
    if ours and originals:
        raise InputError(
            f"{folder} holds {len(ours)} patch files and {len(originals)} {ORIGINAL_SUFFIX} files of the original "
            "code: keep them in two folders"
        )
    if not ours and not originals:
        raise InputError(f"{folder} holds no <class>/<stem>{SUFFIX}; {MEND} --save_feature_path {folder}")
    return ours or originals


def _original_headers(paths: list[Path], xyz_dim: int | None) -> list[PatchFile]:
    """Headers for the original's .pt files, all like the first one, whose widths and grids are worked out."""
    first = _load_original(paths[0])
    background = first[first[:, 0] == 0]
    leading = (background != 0).int().argmax(dim=1)  # zeros in front
    if xyz_dim is None:
        if len(background) == 0 or leading.min() != leading.max():
            raise InputError(f"{paths[0]} does not show where its xyz part ends: give its width as --xyz_dim")
        xyz_dim = int(leading[0])
    elif len(background) and leading.max() != xyz_dim:
        # One row may begin with zeros by chance, and then with fewer than the xyz part is wide.
        shown = int(leading.max())
        if shown > xyz_dim or (leading == shown).sum() > 1:
            raise InputError(f"{paths[0]} shows by its background that xyz is {shown} wide, not --xyz_dim {xyz_dim}")
    if not 0 < xyz_dim < first.shape[1]:
        raise InputError(f"{paths[0]} is {first.shape[1]} wide, which leaves no rgb part beside --xyz_dim {xyz_dim}")
    xyz_grid = grid_side(first)
    _check_finite(paths[0], "rgb", first[:, xyz_dim:])
    rgb_grid = math.isqrt(len(_unscramble(first[:, xyz_dim:])))
    layout = (xyz_dim, first.shape[1] - xyz_dim, xyz_grid, rgb_grid, "unknown", "unknown", "aligned")
    names = [re.fullmatch(r"(.*?)(\d*)", path.stem) for path in paths]
    return [PatchFile(path, name[1], name[2], *layout) for path, name in zip(paths, names, strict=True) if name]


def _load_original(path: Path) -> Tensor:
    patches = read_checkpoint(path)
    if (
        not isinstance(patches, Tensor)
        or patches.ndim != 2
        or not len(patches)
        or math.isqrt(len(patches)) ** 2 != len(patches)
    ):
        found = tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
        raise InputError(f"{path} holds {found}, expected a tensor (patches of a square grid, C_xyz + C_rgb); {MEND}")
    return patches


def _read_original(file: PatchFile) -> tuple[Tensor, Tensor]:
    """The xyz (n, C_xyz) and rgb (rgb_grid**2, C_rgb) patches of a .pt file, each row-major over its grid."""
    patches = _load_original(file.path)
    if patches.shape != (file.xyz_grid**2, file.xyz_dim + file.rgb_dim):
        raise InputError(
            f"{file.path} holds {tuple(patches.shape)}, but the first file {file.xyz_grid**2} patches "
            f"{file.xyz_dim + file.rgb_dim} wide: keep the files of one run in a folder"
        )
    _check_finite(file.path, "rgb", patches[:, file.xyz_dim :])
    rgb = _unscramble(patches[:, file.xyz_dim :])
    if len(rgb) != file.rgb_grid**2:
        raise InputError(f"{file.path} has another rgb grid than the first file: keep the files of one run in a folder")
    return patches[:, : file.xyz_dim].contiguous(), rgb


def _unscramble(paired: Tensor) -> Tensor:
    """The rgb patches (n, C) of which the "reference" pairing made (rows, C): n is the least that explains them all."""
    rows = len(paired)
    for n in (side**2 for side in range(1, math.isqrt(rows) + 1) if rows % side**2 == 0):
        source = pair_rgb(torch.arange(n)[:, None], rows, "reference")[:, 0]
        rgb = paired.new_zeros(n, paired.shape[1])
        rgb[source] = paired
        if torch.equal(rgb[source], paired):
            return rgb
    raise AssertionError("n = rows explains every order")


def to_storage(features: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, C) in `dtype`, with zeros where the features are exactly zero and nowhere else."""
    if features.dtype == dtype:
        return features
    stored = features.to(dtype)
    smallest = torch.tensor(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, device=features.device)
    underflow = (stored == 0) & (features != 0)
    return torch.where(underflow, smallest.copysign(features.float()).to(dtype), stored)


def _check_finite(path: Path, name: str, patches: Tensor) -> None:
    bad = int((~torch.isfinite(patches)).any(dim=1).sum())
    if bad:
        raise InputError(
            f"{path}: {bad} of {len(patches)} {name} patches hold NaN or infinite values in {patches.dtype}; "
            "check the scan and the backbone's weights"
        )
