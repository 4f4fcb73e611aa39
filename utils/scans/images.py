"""Image files of any mode as RGB images and ground truths."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.errors import InputError
from utils.scans.files import cannot_read, open_file

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_LOSSY = ("JPEG", "MPO", "WEBP")  # a ground truth in these has gray pixels around its defects
_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL_BYTES = 65536  # some programs append their own data after the end marker
_DARK = 4096  # values of 12 bits, stored in 16
_warned_folders: set[Path] = set()
MAX_MEGAPIXELS, MEGAPIXELS = 64, (1, 4000)  # default and bounds of --max_megapixels
Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)  # open_image reports it
logger = logging.getLogger(__name__)


def set_max_megapixels(number: int) -> None:
    """Set the size of the largest image that this process opens."""
    Image.MAX_IMAGE_PIXELS = number * 1_000_000


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, without transparency."""
    if image.mode.startswith("I"):  # 16-bit gray: scaled here, because PIL's own conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA: otherwise PIL warns of palettes with transparency
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # a conversion copies in any case


def read_image(path: Path) -> np.ndarray:
    """Read an image of any mode as (H, W, 3) uint8, and warn once per folder of 16-bit images that are nearly black."""
    with open_image(path) as image:
        if image.mode == "F":
            raise InputError(f"{path} holds floating-point pixels, expected 8-bit colors. Give the image, not a cloud.")
        has_16_bits = image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))
        rgb = np.array(to_rgb(image))
        is_dark = has_16_bits and np.asarray(image).max() < (_DARK if image.mode.startswith("I") else _DARK >> 8)
    if is_dark and path.parent not in _warned_folders:
        _warned_folders.add(path.parent)
        problem = f"{path} has 16 bits, but no value of {_DARK} or more, so it is nearly black"
        logger.warning("%s. Scale the values of its folder to the full range, or store 8 bits", problem)
    return rgb


def defect_mask(image: Image.Image) -> np.ndarray:
    """Return a ground truth as (H, W) bool, True for a defect: a pixel that is not zero or black.

    In a format that may be lossy, a defect is brighter than half of white.
    """
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
    """Return the share of defect pixels in a ground truth (0 without a file), and its problem or "".

    Raises InputError if the file cannot be read.
    """
    share, in_alpha = 0.0, False
    if path is not None:
        with open_image(path) as image:
            share = float(defect_mask(image).mean())
            alpha = np.asarray(image.getchannel("A")) if image.mode in ("RGBA", "LA") else np.zeros(1)
            in_alpha = share in (0, 1) and bool((alpha != alpha.flat[0]).any())
    problem = ""
    if in_alpha:
        problem = "has its content in the transparency, which is ignored. Save it as black and white"
    elif defective and not share:
        problem = "has no defect pixel, but its sample is defective. Mark the defect, or move the sample to good"
    elif not defective and share:
        problem = (
            f"marks {share:.2%} of a good sample as defective. Clear it, or move the sample to its defect's folder"
        )
    elif share > 0.5:
        problem = f"marks {share:.0%} of the image as defective. Invert it if its background is white, or correct it"
    return share, f"{path} {problem}." if problem else ""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image. PIL's errors, also inside the block, become an InputError that names the file.

    Raises InputError also for an image of more pixels than `set_max_megapixels` allows, or with an orientation in its
    EXIF data, because nobody but the user knows if its cloud is turned, too.
    """
    try:
        with open_file(path, "image") as file, Image.open(file, formats=_FORMATS) as image:
            _check_orientation(path, image)
            yield image
    except (InputError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:g} megapixels"
        fix = "Scale the files of the sample down, or raise --max_megapixels."
        raise InputError(f"{path} has more than {limit}. {fix}") from error
    except Exception as error:  # with damaged bytes a decoder may raise almost anything
        if isinstance(error, OSError) and error.errno is not None:  # a system error; PIL's have no number
            raise cannot_read(path, error) from error
        kinds = "PNG, JPEG, BMP, WebP or TIFF"
        raise InputError(f"{path} is no complete {kinds} image. Restore it from its source.") from error


def _check_orientation(path: Path, image: Image.Image) -> None:
    orientation = 1
    with suppress(Exception):  # damaged EXIF data do not matter; the reader of PNGs would decode the image
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        raise InputError(
            f"{path} has the EXIF orientation {orientation}: viewers turn or mirror it. Store its pixels as the cloud "
            "and the ground truth have them, and remove the EXIF data."
        )


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
