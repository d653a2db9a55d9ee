"""Image files: a list of formats, limits, one way to RGB.

As the official code (`Image.open(path).convert("RGB")`): the first frame of an animation, and EXIF
orientation is not applied.  Differs: gray levels of 16 bits are scaled (there they end at 255,
nearly all white), those of 32 bits are refused, transparent places are white (there whatever lies
below, mostly black), and formats outside the list are refused: some of their decoders start other
programs.
"""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime import InputError, named

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 200_000_000  # an image bomb is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own, lower limit: each open warns from half of it on
MAX_BYTES = 500_000_000
MAX_NAME = 4096  # bytes of a path on Linux: what is longer is a picture in base64
DECODER_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError),
    *(MemoryError, NotImplementedError, struct.error, zlib.error),
)
NOT_SUPPORTED = {  # keys of a record that change what its author meant -> what to do
    "images": "name the key 'image', a path or a list of paths",
    "image_path": "name the key 'image'",
    "history": "write earlier turns into 'question'",
    "system": "name the key 'system_prompt'",
} | dict.fromkeys(("video", "videos", "clip", "audio", "audios"), "remove the record")


def image_names(record: dict, name: object) -> list[str]:
    """Image paths of a record; absent, null, "" and [] all mean text only.  `name` is for errors.

    Also refuses, by name, what this program would otherwise pass over (NOT_SUPPORTED).
    """
    for key, remedy in NOT_SUPPORTED.items():
        if record.get(key):
            raise InputError(f"{name}: {key!r} is not supported; {remedy}")
    image = record.get("image")
    names = image if isinstance(image, list) else [] if image in (None, "") else [image]
    if not all(isinstance(path, str) and path for path in names):
        raise InputError(f"{name}: 'image' must be a path or a list of paths, got {image!r:.60}")
    return names


def image_paths(root: Path, record: dict, name: object) -> tuple[Path, ...]:
    """Files of a record under `root`; absolute names, and what leaves the root, are refused."""
    paths = []
    for image in image_names(record, name):
        path, inside = Path(root) / image, False
        with contextlib.suppress(ValueError):  # a null character, half a character
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        if not inside or "://" in image or Path(image).is_absolute() or len(image) > MAX_NAME:
            raise InputError(f"{name}: image {image!r:.80} is no path within its root {root}")
        paths.append(path)
    return tuple(paths)


def open_image(path: Path) -> Image.Image:
    """The image with its size known but not yet decoded; limits on bytes and pixels."""
    if not os.path.isfile(path):  # also a name that no file system takes
        raise InputError(f"no image {path}")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"image {path} has more than {MAX_BYTES} bytes")
    try:
        image = Image.open(path, formats=FORMATS)
    except DECODER_ERRORS as error:
        unknown = f"it is none of {', '.join(FORMATS)}, or cut off; convert it, or fetch it again"
        reason = unknown if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"image {path} cannot be read: {reason}") from None
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"image {path} has more than {MAX_PIXELS} pixels")
    return image


def load_image(path: Path) -> Image.Image:
    """The decoded RGB image; InputError names a file that is broken, cut off or of 32 bits."""
    with open_image(path) as image:
        try:
            image.load()
            return to_rgb(image)
        except DECODER_ERRORS as error:
            raise InputError(f"image {path} cannot be decoded: {error}") from None


def checked_images(root: Path, record: dict, name: object) -> tuple[Path, ...]:
    """`image_paths`, each of which was opened but not decoded; errors begin with `name`."""
    paths = image_paths(root, record, name)
    with named(name):
        for path in paths:
            open_image(path).close()
    return paths


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits: gray levels of 16 bits scaled to 0..255, transparency on white."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise InputError("gray levels of 32 bits have no known range; save it as 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64)
        transparent = levels == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(transparent, 255, np.rint(levels / 257)).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def jpeg(tile: Image.Image, quality: int) -> Image.Image:
    """The tile after a round through JPEG (the official `data_augment`)."""
    buffer = io.BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
