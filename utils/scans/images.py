"""Pictures as stored: whatever PNG or JPEG holds becomes a photograph or a ground truth, the same way everywhere."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import InputError
from utils.scans.files import cannot_read


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PNG or JPEG as 8-bit RGB; transparency is dropped."""
    if image.mode.startswith("I"):  # 16-bit gray: scaled here, because PIL's own conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, for PIL warns of palettes with transparency otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")


def defect_mask(image: Image.Image) -> np.ndarray:
    """Ground truth as (H, W) bool: whatever is neither zero nor black is a defect."""
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        return np.asarray(
            np.asarray(image) != palette.any(axis=1).argmin()
        )  # its first black entry, 0 where none is black
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return np.asarray(image) != 0  # class ids as stored: scaling 16 bits to 8 would lose the small ones
    return np.asarray(np.asarray(to_rgb(image)).any(axis=2))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a PNG or JPEG; what PIL raises here or in the block becomes an InputError that names the file."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has more pixels than a scan can have ({error}): scale its files down") from error
    except (OSError, SyntaxError, ValueError, IndexError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system; those of PIL have no number
            raise cannot_read(path, error) from error
        raise InputError(f"{path} is no complete PNG or JPEG picture ({error}): restore it from its source") from error
