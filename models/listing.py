"""Table of --list_backbones."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models import RGB_BACKBONES, XYZ_BACKBONES, rgb_spec
from utils.reporting.messages import show
from utils.reporting.tables import print_columns


class BackboneRow(NamedTuple):
    """A row of the table."""

    name: str
    modality: str
    width: int
    grid: str  # rgb: "28 x 28" patches; xyz: "every group" or "every point"
    weights: str  # the path found, "absent", or the reason that no file is needed
    published: str  # file names and source; empty where no file is needed


def list_backbones(
    checkpoint_dir: Path, img_size: int, chosen: str = "", layers: Sequence[int] | None = None
) -> list[BackboneRow]:
    """Rows of --list_backbones: each named backbone, and the RGB backbone `chosen` with these layers.

    Reads no weights and downloads nothing.
    """
    import torch

    from models.rgb_backbone import cached_weights

    rows, names = [], list(RGB_BACKBONES)
    if chosen and chosen not in names:
        names.append(chosen)
    for name in names:
        rgb = rgb_spec(name)
        with torch.device("meta"):  # shapes without memory
            network = rgb.build(img_size, layers if name == chosen else None)
        found = rgb.files.find(checkpoint_dir) or cached_weights(rgb.timm_name) if rgb.files.names else rgb.files.source
        grid = f"{network.grid_size} x {network.grid_size}"
        rows.append(BackboneRow(name, "rgb", network.embed_dim, grid, str(found or "absent"), str(rgb.files)))
    for name, xyz in XYZ_BACKBONES.items():
        with torch.device("meta"):
            width = xyz.build().embed_dim
        found = xyz.files.find(checkpoint_dir) if xyz.files.names else xyz.files.source
        grid = "every group" if xyz.grouped else "every point"
        rows.append(BackboneRow(name, "xyz", width, grid, str(found or "absent"), str(xyz.files)))
    return rows


def print_backbones(checkpoint_dir: Path, img_size: int, chosen: str, layers: Sequence[int] | None) -> None:
    """Print the table of --list_backbones, and the sources of the weights; arguments as in `list_backbones`."""
    rows = list_backbones(checkpoint_dir, img_size, chosen, layers)
    print_columns([("name", "branch", "width", "grid", "weights"), *[tuple(map(str, row[:5])) for row in rows]])
    published = [f"  {row.name}: {row.published}" for row in rows if row.published]
    other = "Any other timm network works by its timm name, such as vit_small_patch14_dinov2.lvd142m."
    for line in ("", "Published as:", *published, "", other):
        show(line)
