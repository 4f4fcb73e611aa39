"""Patch files that Unsupervised Feature Fusion (UFF) is trained on. Only this module knows their format.

One safetensors file per good training sample, <save_feature_path>/<class>/<stem>.safetensors:

    xyz  (xyz_grid**2, C_xyz)   row-major over its grid, float16 or float32
    rgb  (rgb_grid**2, C_rgb)   on the grid of its own backbone; readers bring it to the xyz grid

The metadata hold a schema version and the fields of `PatchFile` except for the path.

Training leaves out every patch whose xyz features hold an exact zero. Where half precision would turn
a value into zero, the writer therefore stores the smallest number instead (6e-8).

The patch files of the original code can be read too: <class><number>.pt, one float32 tensor (n, C_xyz + C_rgb) each,
with the rgb patches on the xyz grid in the scrambled order of the "reference" pairing.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from utils.checkpoint_files import read_checkpoint
from utils.choices import PAIRINGS, STORAGE_DTYPE_NAMES
from utils.errors import InputError
from utils.records import PatchFeatures
from utils.scans.files import atomic_path, check_folder, open_file

SCHEMA = "m3dm-patches/1"
SUFFIX, ORIGINAL_SUFFIX = ".safetensors", ".pt"
STORAGE_DTYPES = dict(zip(STORAGE_DTYPE_NAMES, (torch.float16, torch.float32), strict=True))
_WRITE_AGAIN = "Write the patch files again with main.py --save_feature."
_KEEP_APART = "Keep the files of each run in a separate folder."


class PatchFile(NamedTuple):
    """Header of a patch file. All files of a training run agree in the fields from `xyz_dim` on."""

    path: Path
    class_name: str
    stem: str  # of the sample, "000"
    xyz_dim: int  # C_xyz
    rgb_dim: int  # C_rgb
    xyz_grid: int  # patches along a side
    rgb_grid: int
    xyz_backbone: str
    rgb_backbone: str
    pairing: str  # the readers' default, see `pair_rgb`


def grid_side(patches: Tensor) -> int:
    """Side of the square grid of patches (..., n, C); ValueError if n is not a square."""
    count = patches.shape[-2]
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(f"{count} patches do not fill a square grid")
    return side


def resize_patches(patches: Tensor, grid: int) -> Tensor:
    """Bring patches to another grid by adaptive average pooling; a multiple of the grid (28 -> 56) repeats them.

    (..., n, C) float, row-major over a square grid, becomes (..., grid**2, C). Plain form: `reference.resize_patches`.
    """
    planes = patches.mT.unflatten(-1, (grid_side(patches),) * 2)
    return F.adaptive_avg_pool2d(planes, grid).flatten(-2).mT.contiguous()  # (..., C, grid, grid) -> (..., grid**2, C)


def pair_rgb(rgb: Tensor, rows: int, pairing: str = "aligned") -> Tensor:
    """The rgb partners (rows, C_rgb) of all xyz patches, from rgb (n, C_rgb), row-major over a square grid.

    "aligned" gives the patch of the same place. "reference" gives the scrambled order of the original training data:
    with r = rows / n, row n * j + i holds patch (r * i + j) mod n.
    """
    if pairing == "aligned":
        return resize_patches(rgb, math.isqrt(rows))
    if pairing != "reference":
        raise InputError(f"Unknown pairing {pairing!r}. Choose one of {', '.join(PAIRINGS)}.")
    n = len(rgb)
    if rows % n:
        raise InputError(f"{rows} xyz patches are not a multiple of {n} rgb patches. Use the aligned pairing.")
    row = torch.arange(rows)
    return rgb[(rows // n * (row % n) + row // n) % n]


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
    """Write the xyz and rgb patches of one training sample, whole or not at all, and return the path of the file.

    `folder` is the value of --save_feature_path; the class folder is made in it. `dtype` is float16 or float32.
    `pairing` is only recorded, as the readers' default.

    Raises InputError if a modality is absent, or holds values that are not finite in this dtype.
    """
    from safetensors.torch import save

    if features.xyz is None or features.rgb is None:
        raise InputError(f"{class_name}/{stem} lacks rgb or xyz. Save features with --method_name DINO+Point_MAE.")
    path = Path(folder) / class_name / f"{stem}{SUFFIX}"
    patches = {"xyz": features.xyz, "rgb": features.rgb}
    tensors = {name: to_storage(each.detach(), dtype).cpu().contiguous() for name, each in patches.items()}
    _check_finite(path, **tensors)
    widths = (features.xyz.shape[1], features.rgb.shape[1])
    grids = (grid_side(features.xyz), grid_side(features.rgb))
    header = PatchFile(path, class_name, stem, *widths, *grids, xyz_backbone, rgb_backbone, pairing)
    metadata = {key: str(value) for key, value in header._asdict().items() if key != "path"}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata | {"schema": SCHEMA}))  # save_file would hide it from other users
    return path


def read_header(path: Path) -> PatchFile:
    """Read the header of a patch file; InputError if the file is truncated, of another schema or contradicts itself."""
    from safetensors import SafetensorError, safe_open

    open_file(path, "weights").close()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        raise InputError(f"{path} is truncated or not a patch file. {_WRITE_AGAIN}") from None
    if metadata.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {metadata.get('schema')!r}, not {SCHEMA!r}. {_WRITE_AGAIN}")
    try:
        header = PatchFile(path, *(kind(metadata[name]) for name, kind in list(PatchFile.__annotations__.items())[1:]))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has incomplete metadata ({error}). {_WRITE_AGAIN}") from None
    expected = {"xyz": (header.xyz_grid**2, header.xyz_dim), "rgb": (header.rgb_grid**2, header.rgb_dim)}
    if shapes != expected:
        raise InputError(f"{path} holds {shapes}, but its metadata say {expected}. {_WRITE_AGAIN}")
    return header


class PatchFileDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """The patch files of a folder, sorted by class and stem, as pairs of patches of one sample.

    An item is (xyz (xyz_grid**2, C_xyz), rgb (xyz_grid**2, C_rgb), index), float32. Row i of rgb is the partner of row
    i of xyz, and `index` is that of the file in `files`. Reading NaN or infinite patches raises an InputError.

    Args:
        folder: value of --save_feature_path, with a folder per class; or a folder of the original's .pt files.
        pairing: "aligned" or "reference", see `pair_rgb`; None: the files' own ("aligned" for .pt files).
        xyz_dim: C_xyz of .pt files, which do not hold it; None: found from patches without a point, all zero in xyz.

    Raises InputError if there are no files, one is damaged, or files of different widths, grids or backbones.
    """

    def __init__(self, folder: Path | str, pairing: str | None = None, xyz_dim: int | None = None) -> None:
        paths = _list_files(Path(folder))
        original = paths[0].suffix == ORIGINAL_SUFFIX
        self.files = _original_headers(paths, xyz_dim) if original else [read_header(path) for path in paths]
        first = self.files[0]
        for file in self.files:
            if file[3:] != first[3:]:
                both = f"{first.path} has {first[3:]}, {file.path} has {file[3:]}"
                names = ", ".join(PatchFile._fields[3:])
                raise InputError(f"The patch files differ in ({names}): {both}. {_KEEP_APART}")
        self.xyz_dim, self.rgb_dim = first.xyz_dim, first.rgb_dim
        self.pairing = pairing or first.pairing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        file = self.files[index]
        read = _read_original if file.path.suffix == ORIGINAL_SUFFIX else _read_patches
        xyz, rgb = (patches.float() for patches in read(file))
        _check_finite(file.path, xyz=xyz, rgb=rgb)
        return xyz, pair_rgb(rgb, len(xyz), self.pairing), index


def _list_files(folder: Path) -> list[Path]:
    check_folder(folder, "Give the folder that main.py --save_feature_path wrote.")
    # A leading dot marks a file that is being written.
    ours = sorted(path for path in folder.glob(f"*/*{SUFFIX}") if not path.name.startswith("."))
    originals = sorted(folder.glob(f"*{ORIGINAL_SUFFIX}"))
    if ours and originals:
        both = f"{len(ours)} patch files and {len(originals)} {ORIGINAL_SUFFIX} files of the original code"
        raise InputError(f"{folder} holds {both}. Keep them in two folders.")
    if not ours and not originals:
        raise InputError(f"{folder} holds no <class>/<stem>{SUFFIX}. {_WRITE_AGAIN}")
    return ours or originals


def _read_patches(file: PatchFile) -> tuple[Tensor, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.path, framework="pt") as content:
            return content.get_tensor("xyz"), content.get_tensor("rgb")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file.path} can no longer be read ({error}). {_WRITE_AGAIN}") from None


def _original_headers(paths: list[Path], xyz_dim: int | None) -> list[PatchFile]:
    """Headers for the original's .pt files, with the widths and grids of the first one."""
    path, first = paths[0], _load_original(paths[0])
    background = first[first[:, 0] == 0]
    zeros = (background != 0).int().argmax(dim=1)  # leading zeros of each row
    if xyz_dim is None:
        if len(background) == 0 or zeros.min() != zeros.max():
            raise InputError(f"{path} does not show the width of its xyz features. Give it as --xyz_dim.")
        xyz_dim = int(zeros[0])
    # By chance, one row may begin with zeros, but with fewer than the width of xyz.
    shown = int(zeros.max()) if len(background) else xyz_dim
    if shown > xyz_dim or (shown < xyz_dim and (zeros == shown).sum() > 1):
        raise InputError(f"{path} has {shown} xyz features, as its background shows. Correct --xyz_dim {xyz_dim}.")
    if not 0 < xyz_dim < first.shape[1]:
        raise InputError(f"{path} is {first.shape[1]} wide, which leaves no rgb features. Correct --xyz_dim {xyz_dim}.")
    grids = (grid_side(first), grid_side(_unscramble(path, first[:, xyz_dim:])))
    layout = (xyz_dim, first.shape[1] - xyz_dim, *grids, "unknown", "unknown", "aligned")
    classes = [path.stem.rstrip("0123456789") for path in paths]
    return [PatchFile(p, name, p.stem.removeprefix(name), *layout) for p, name in zip(paths, classes, strict=True)]


def _load_original(path: Path) -> Tensor:
    patches = read_checkpoint(path)
    found = tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
    if isinstance(patches, Tensor) and patches.ndim == 2 and 0 < len(patches) == math.isqrt(len(patches)) ** 2:
        return patches
    raise InputError(f"{path} holds {found}, not a tensor (patches of a square grid, C_xyz + C_rgb). {_WRITE_AGAIN}")


def _read_original(file: PatchFile) -> tuple[Tensor, Tensor]:
    """The xyz (n, C_xyz) and rgb (rgb_grid**2, C_rgb) patches of a .pt file, each row-major over its grid."""
    patches, expected = _load_original(file.path), (file.xyz_grid**2, file.xyz_dim + file.rgb_dim)
    if patches.shape != expected:
        raise InputError(f"{file.path} holds {tuple(patches.shape)}, but the first file {expected}. {_KEEP_APART}")
    rgb = _unscramble(file.path, patches[:, file.xyz_dim :])
    if len(rgb) != file.rgb_grid**2:
        raise InputError(f"{file.path} has another rgb grid than the first file. {_KEEP_APART}")
    return patches[:, : file.xyz_dim].contiguous(), rgb


def _unscramble(path: Path, paired: Tensor) -> Tensor:
    """Fewest rgb patches (n, C) that the "reference" pairing turns into `paired` (rows, C)."""
    _check_finite(path, rgb=paired)
    rows = len(paired)
    for n in (side**2 for side in range(1, math.isqrt(rows) + 1) if rows % side**2 == 0):
        source = pair_rgb(torch.arange(n)[:, None], rows, "reference")[:, 0]
        rgb = paired.new_zeros(n, paired.shape[1])
        rgb[source] = paired
        if torch.equal(rgb[source], paired):
            return rgb
    raise AssertionError("n = rows explains every order")


def to_storage(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert (n, C) to `dtype`; only features that are exactly zero become zero."""
    if features.dtype == dtype:
        return features
    stored = features.to(dtype)
    smallest = torch.tensor(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, device=features.device)
    underflow = (stored == 0) & (features != 0)
    return torch.where(underflow, smallest.copysign(features.float()).to(dtype), stored)


def _check_finite(path: Path, **modalities: Tensor) -> None:
    for name, patches in modalities.items():
        if bad := int((~torch.isfinite(patches)).any(dim=1).sum()):
            problem = f"{bad} of {len(patches)} {name} patches hold NaN or infinite values in {patches.dtype}"
            raise InputError(f"{path}: {problem}. Check the sample and the backbone's weights.")
