"""The seeded stand-in checkpoints that the goldens were recorded with, in the formats of the published checkpoints.

Each tensor is drawn by NumPy's legacy generator, whose stream never changes, seeded by the CRC-32 of "<file>/<key>".
So the values depend only on this file and `goldens/weights_inventory.json`. The scores computed with them say nothing
about accuracy; they only have to equal the recorded ones.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INVENTORY = Path(__file__).parent / "goldens" / "weights_inventory.json"


def write_golden_weights(folder: Path) -> None:
    """Write the four checkpoints, 570 MB, into a folder that exists."""
    for file, entries in json.loads(INVENTORY.read_text()).items():
        state = {entry["key"]: seeded_tensor(file, **entry) for entry in entries}
        torch.save(wrapped(file, state), folder / file)


def seeded_tensor(file: str, key: str, shape: list[int], dtype: str) -> Tensor:
    """One tensor of a checkpoint; integers are zero, everything else is drawn to suit its role in the network."""
    if dtype != "float32":
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    generator = np.random.RandomState(zlib.crc32(f"{file}/{key}".encode()))
    leaf = key.rsplit(".", 1)[-1]
    scales = {"running_mean": 0.05, "cls_token": 0.3, "cls_pos": 0.3, "pos_embed": 0.5}
    if leaf == "running_var":
        values = generator.uniform(0.5, 1.5, shape)
    elif leaf in scales:
        values = generator.standard_normal(shape) * scales[leaf]
    elif len(shape) >= 2:
        values = generator.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    elif leaf == "weight":
        values = generator.uniform(0.7, 1.3, shape)
    else:
        values = generator.standard_normal(shape) * 0.1
    # Neighbor offsets are a few millimeters. Without this gain the encoder's output would hardly vary.
    if key.endswith("encoder.first_conv.0.weight"):
        values = values * 200.0
    if key.endswith("pos_embed.0.weight") and "decoder" not in key:
        values = values * 8.0
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def wrapped(file: str, state: dict[str, Tensor]) -> dict[str, object]:
    """State dict wrapped as in the published checkpoint."""
    if file.startswith("dino"):
        return dict(state)
    if file == "uff.pth":
        args = argparse.Namespace(lr=0.003, batch_size=16, accum_iter=16, data_path="datasets/patch_lib")
        optimizer = {"state": {}, "param_groups": []}
        return {"model": state, "optimizer": optimizer, "epoch": 2, "scaler": {}, "args": args}
    return {"base_model": state, "epoch": 300, "metrics": {"acc": np.float64(0.0)}, "best_metrics": {"acc": 0.0}}
