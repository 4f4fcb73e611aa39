"""PNG and JPEG files of any mode as RGB images and ground truths."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import InputError
from utils.scans.files import cannot_read

_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL_BYTES = 65536  # some programs append their own data after the end marker


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, without transparency."""
    if image.mode.startswith("I"):  # 16-bit gray: scaled here, because PIL's own conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA: otherwise PIL warns of palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def defect_mask(image: Image.Image) -> np.ndarray:
    """Return a ground truth as (H, W) bool, True for a defect: a pixel that is not zero or black."""
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        background = palette.any(axis=1).argmin()  # the first black entry, or 0 if none is black
        return np.asarray(np.asarray(image) != background)
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return np.asarray(image) != 0  # ids of defect types as stored; scaled to 8 bits, small ones would become 0
    return np.asarray(np.asarray(to_rgb(image)).any(axis=2))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a PNG or JPEG. PIL's errors, also inside the block, become an InputError that names the file."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        problem = f"{path} has more pixels than allowed ({error})"
        raise InputError(f"{problem}. Scale the files of the sample down.") from error
    except (OSError, SyntaxError, ValueError, IndexError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system error; PIL's have no number
            raise cannot_read(path, error) from error
        raise InputError(f"{path} is no complete PNG or JPEG image ({error}). Restore it from its source.") from error


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from the header of a PNG or JPEG; InputError if the file is neither or is cut short."""
    with open_image(path) as image:
        width, height = image.size
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            if _END_MARKERS[image.format or ""] not in file.read():
                raise OSError("the end of the file is missing")
    return height, width
