"""Tables that main.py prints in place of a run: --list_backbones and --inspect_dataset."""

import argparse
from pathlib import Path

from dataset import class_folders, find_classes
from models import list_backbones
from runner.dataset_check import print_dataset_check
from runner.settings import detector_configs, extraction_config
from utils.reporting.tables import print_columns


def print_backbones(checkpoint_dir: Path, img_size: int) -> None:
    """Print the backbones with their widths, grids and weights, and the sources of the weights."""
    rows = list_backbones(checkpoint_dir, img_size)
    print_columns([("name", "branch", "width", "grid", "weights"), *[tuple(map(str, row[:5])) for row in rows]])
    print("\nPublished as:")
    for row in rows:
        if row.published:
            print(f"  {row.name}: {row.published}")
    print("\nAny other vision transformer of timm works by its name there, such as vit_small_patch14_dinov2.lvd142m.")


def print_dataset(args: argparse.Namespace) -> bool:
    """Print the contents of the dataset, as far as the methods of the flags use it; returns whether it is sound."""
    modalities = extraction_config(detector_configs(args)).method.modalities
    chosen = args.classes or class_folders(args.dataset_path)
    classes = find_classes(args.dataset_path, args.dataset_type, chosen)
    return not print_dataset_check(args.dataset_path, classes, modalities, args.num_workers)
