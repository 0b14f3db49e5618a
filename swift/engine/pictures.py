"""Image files and data URLs to pictures of Pillow. Nothing is fetched."""

import base64
import binascii
import io
import struct
import zlib
from pathlib import Path
from typing import Any

MOST_BYTES = 20 * 2**20  # of an image file
MOST_PIXELS = 50_000_000  # of an image: 150 MB while it is read
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
# What Pillow raises for files that are broken; it has no error of its own for it.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError)


def of_bytes(raw: bytes) -> Any:
    """The picture (PIL, RGB) in an image file, turned as its camera says. ValueError says what is wrong with it."""
    from PIL import Image, ImageOps

    if len(raw) > MOST_BYTES:
        raise ValueError(f"the image has {len(raw)} bytes, {MOST_BYTES} at most")
    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    broken = (*BROKEN, *too_large, struct.error, zlib.error)
    try:
        image = Image.open(io.BytesIO(raw), formats=sorted(set(FORMATS.values())))
        size, is_animated = image.size, getattr(image, "is_animated", False)
    except too_large:
        raise ValueError(f"the image has more than {MOST_PIXELS} pixels, which are the most") from None
    except broken:
        raise ValueError("the image cannot be read: it is no PNG, JPEG, WebP or GIF") from None
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"the image has {size[0]} x {size[1]} pixels, {MOST_PIXELS} at most")
    if is_animated:
        raise ValueError("the image is animated: send one of its pictures")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except broken:
        raise ValueError("the image cannot be read: the file is damaged") from None


def of_url(url: str) -> Any:
    """The picture in a data URL, as ``of_bytes`` reads it. ValueError for any other URL, too."""
    head, comma, data = url.partition(",")
    scheme, colon, kind = head.partition(":")
    if scheme.lower() != "data" or not colon:
        what = f"an image is given as {scheme[:20]}:, which is not fetched" if colon else "an image is given by no URL"
        raise ValueError(f"{what}: send the image itself, as data:image/png;base64,...")
    media_type, *parameters = kind.lower().split(";")
    if media_type not in FORMATS:
        raise ValueError(f"images are PNG, JPEG, WebP or GIF, not {media_type[:40] or 'a text'}")
    if not comma or parameters[-1:] != ["base64"]:
        raise ValueError("a data URL of an image is data:image/png;base64, and what follows")
    if len(data) * 3 // 4 > MOST_BYTES + 2:
        raise ValueError(f"the image has {len(data) * 3 // 4} bytes, {MOST_BYTES} at most")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the image is no valid base64") from None
    return of_bytes(raw)


def of_row(given: Any) -> Any:
    """The picture that a row of data names: a file, a data URL, or a dict of ``bytes`` or ``path`` as Parquet has it.

    ValueError says what is wrong with it.
    """
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return of_bytes(given)
    if not isinstance(given, str):
        raise ValueError(f"an image is a file name or a data URL, not {type(given).__name__}")
    if given.partition(":")[0].lower() in ("data", "http", "https", "file"):
        return of_url(given)
    try:
        return of_bytes(Path(given).read_bytes())
    except OSError as problem:
        raise ValueError(f"{given} cannot be read: {problem.strerror or problem}") from None
