"""Image files of any mode as RGB images and ground truths."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.choices import MAX_MEGAPIXELS
from utils.errors import InputError
from utils.reporting.messages import warn_once
from utils.scans.files import open_file

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_LOSSY = ("JPEG", "MPO", "WEBP")  # a ground truth in these has gray pixels around its defects
_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL_BYTES = 65536  # some programs append their own data after the end marker
OVERLAY_SIDE = 1024  # pixels: longest side of an image that is kept for an overlay
Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)  # open_image reports it


def set_max_megapixels(number: int) -> None:
    """Set the size of the largest image that this process opens."""
    Image.MAX_IMAGE_PIXELS = number * 1_000_000


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, without transparency."""
    if image.mode.startswith("I"):  # 16-bit gray: scaled here, because PIL's own conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA: otherwise PIL warns of palettes with transparency
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def read_image(path: Path) -> np.ndarray:
    """Read an image of any mode as (H, W, 3) uint8, and warn of 16-bit images that are nearly black."""
    with open_image(path) as image:
        if image.mode == "F":
            raise InputError(f"{path} holds floating-point pixels, expected 8-bit colors. Give the image, not a cloud.")
        has_16_bits = image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))
        rgb = np.array(to_rgb(image))
    if has_16_bits and rgb.max() <= 16:  # 12 bits stored in 16
        problem = f"{path} has 16 bits, but uses at most 12, so it is nearly black"
        warn_once(
            "range", path.parent, f"{problem}. Scale the images of its folder to the full range, or store 8 bits."
        )
    return rgb


def shrink_image(image: np.ndarray) -> np.ndarray:
    """Scale an image (H, W) or (H, W, 3) uint8 down to at most OVERLAY_SIDE pixels a side, by averaging."""
    shrink = OVERLAY_SIDE / max(image.shape)
    if shrink >= 1:
        return image
    height, width = (max(1, round(side * shrink)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def defect_mask(image: Image.Image) -> np.ndarray:
    """Return a ground truth as (H, W) bool, True for a defect: above 127 in lossy formats, else not zero or black."""
    if image.format in _LOSSY:
        return np.asarray(image.convert("L")) > 127
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        background = palette.any(axis=1).argmin()  # the first black entry, or 0 if none is black
        return np.asarray(np.asarray(image) != background)
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return np.asarray(image) != 0  # ids of defect types as stored; scaled to 8 bits, small ones would become 0
    return np.asarray(np.asarray(to_rgb(image)).any(axis=2))


def defect_share(path: Path | None, defective: bool) -> tuple[float, str]:
    """Return the share of defect pixels in a ground truth, 0 without a file, and its problem or ""."""
    share, in_alpha = 0.0, False
    if path is not None:
        with open_image(path) as image:
            share = float(defect_mask(image).mean())
            alpha = np.asarray(image.getchannel("A")) if image.mode in ("RGBA", "LA") else np.zeros(1)
            in_alpha = share in (0, 1) and bool((alpha != alpha.flat[0]).any())
    marked = f"marks {share:.2%} of"
    problems = {
        "has its content in its alpha channel, which is ignored. Save it in black and white": in_alpha,
        "marks no defect in a defective sample. Mark it, or move the sample to good": defective and not share,
        f"{marked} a good sample as defective. Clear it, or move the sample to a defect": share and not defective,
        f"{marked} the image as defective. Invert it if its background is white, or correct it": share > 0.5,
    }
    return share, next((f"{path} {problem}." for problem, holds in problems.items() if holds), "")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image. PIL's errors, also inside the block, become an InputError that names the file.

    An orientation in the EXIF data is refused, because only the user knows whether the cloud is rotated as well.
    """
    try:
        with open_file(path, "image") as file, Image.open(file, formats=_FORMATS) as image:
            orientation = 1
            with suppress(Exception):  # damaged EXIF data is ignored; getexif of PNGs would decode the image
                orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            if orientation in range(2, 9):
                problem = f"{path} has the EXIF orientation {orientation}, so viewers rotate or mirror it"
                raise InputError(f"{problem}. Store its pixels in the cloud's orientation, and remove the EXIF data.")
            yield image
    except (InputError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = f"{path} has more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:g} megapixels"
        raise InputError(f"{problem}. Scale the files of the sample down, or raise --max_megapixels.") from error
    except Exception as error:  # with damaged bytes a decoder may raise almost anything
        fix = "Restore it, or save it again as PNG"
        raise InputError(
            f"{path} is not a complete PNG, JPEG, BMP, WebP or TIFF that can be decoded. {fix}."
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from the header of an image; InputError if the file is no image or is cut short."""
    with open_image(path) as image:
        width, height = image.size
        marker = _END_MARKERS.get(image.format or "")
        if marker is None:
            image.load()  # these formats do not mark their end
            return height, width
        with open_file(path, "image") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            if marker not in file.read():
                raise OSError("the end of the file is missing")
    return height, width
