"""Pictures as stored: whatever PNG or JPEG holds becomes a photograph or a ground truth, the same way everywhere."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PNG or JPEG as 8-bit RGB; transparency is dropped."""
    if image.mode.startswith("I"):  # 16-bit grey: scaled here, because PIL's own conversion clips at 255
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
