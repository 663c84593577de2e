"""Decoding pictures to RGB with 8 bits a channel, and saying what is wrong with one."""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from gcl_kernels.training.data.faults import quoted, reason
from gcl_kernels.training.data.streams import SpecialFileError, open_plain
from gcl_kernels.training.errors import InputError

MOST_PIXELS = 89_478_485
"""Pixels of the largest picture that is decoded, Pillow's own limit: some 256 MiB in RGB."""

# Pillow warns of pictures above its limit and refuses those above twice that; here it is a fault of the picture.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# What Pillow remarks about damaged notes beside the pixels is nothing to act on.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

REFUSED_FORMATS = {"EPS"}
"""Formats for which Pillow runs another program."""

EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
"""Pillow's modes with at most 8 bits a channel, which it converts to RGB rightly."""

_TAR_PART = re.compile(r"(.+)@(\d+)\+(\d+)", re.DOTALL)
_IMAGES_REMEMBERED = 200_000
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0


class ImageError(InputError):
    """An image that cannot be used; the message says why and names it."""


class UnknownRangeError(ValueError):
    """Pixels of which nothing says what black and white are."""


def load_image(path: str | Path) -> Image.Image:
    """Open an image as RGB, 8 bits a channel; what is transparent becomes white, as on a page.

    Grey of 16 bits is scaled, 0..65535 to 0..255, and so is grey of floats in 0..1. Of several frames the first counts. A
    camera's note on how it was held (EXIF orientation) is not followed. `FILE.tar@OFFSET+SIZE` is that part of an
    uncompressed tar file.

    Raises:
        ImageError: what is no file, cannot be decoded, has more than `MOST_PIXELS` pixels, or has pixels whose range is
            not known (32-bit integers, floats beyond 0..1).
    """
    name = str(path)
    try:
        source = _opened(name)
    except FileNotFoundError:
        raise ImageError(_no_file(name)) from None
    except SpecialFileError as error:
        raise ImageError(f"{error.strerror} in place of a file, {quoted(name)}") from None
    except OSError as error:
        raise ImageError(f"a file that cannot be opened ({reason(error)}), {quoted(name)}") from None
    return decode_image(source, quoted(name))


def decode_image(source: BinaryIO, name: str) -> Image.Image:
    """`load_image` of an open file, or of bytes in `BytesIO`; closes it. `name` is what errors call it."""
    try:
        with source, Image.open(source, formats=_formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "JPEG2000" and not _has_end(source):
                raise EOFError
            return _rgb(image)
    except UnknownRangeError as error:
        raise ImageError(f"pixels of mode '{error}' whose range is not known, {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"a picture of more than {MOST_PIXELS:,} pixels, {name}") from None
    except Exception:
        # Decoders are other people's code: which class they raise for a damaged file is theirs to choose.
        raise ImageError(f"a file that cannot be decoded, {name}") from None


def image_fault(path: str | Path) -> str | None:
    """What is wrong with an image file, None when it can be decoded."""
    try:
        load_image(path)
    except ImageError as error:
        return str(error)
    return None


class ImageCheck:
    """Says what is wrong with an image file, looking at each once however many rows name it.

    `check`: `"decode"` it, ask whether it `"exists"`, or `"none"`.
    """

    def __init__(self, check: str = "decode") -> None:
        self._check = check
        self._faults: dict[str, str | None] = {}

    def __call__(self, path: str) -> str | None:
        if self._check == "none":
            return None
        if path not in self._faults:
            if len(self._faults) >= _IMAGES_REMEMBERED:
                self._faults.clear()
            self._faults[path] = image_fault(path) if self._check == "decode" else _absence(path)
        return self._faults[path]


def _absence(path: str) -> str | None:
    part = _part(path)
    if os.path.isfile(part[0] if part else path):
        return None
    return _no_file(path)


def _part(path: str) -> tuple[str, int, int] | None:
    """The tar file, the first byte and the number of bytes, where a path names a part of one."""
    match = _TAR_PART.fullmatch(path)
    return (match[1], int(match[2]), int(match[3])) if match and not os.path.lexists(path) else None


def _no_file(path: str) -> str:
    # A URL that has been made an absolute path has one of its slashes.
    if url := re.search(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+:)/+([^/].*)", path, re.DOTALL):
        return f"a URL, which is not fetched, {quoted(f'{url[1]}//{url[2]}')}"
    return f"no file {quoted(path)}"


def _opened(path: str) -> Any:
    part = _part(path)
    if part is None:
        return open_plain(path)
    archive, start, size = part
    with open_plain(archive) as file:
        if start + size > file.seek(0, 2):
            raise OSError(0, "fewer bytes than that")
        file.seek(start)
        return BytesIO(file.read(size))


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in REFUSED_FORMATS]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image).convert("RGB")
    if image.mode not in EIGHT_BITS:
        raise UnknownRangeError(image.mode)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled; Pillow's own conversion would cut off what is above 255."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        top = 2 ** int(np.min(tags.get(_BITS_PER_SAMPLE, 16))) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM") and values.min() >= 0 and values.max() <= 65535:
        top = 65535  # both have at most 16 bits, and Pillow scales a PPM's other maxima to this one
    elif image.mode == "F" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        top = 1
    else:
        raise UnknownRangeError(image.mode)
    scaled = np.rint(values.astype(np.float32) * np.float32(255 / top)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled = np.where(values == transparent, np.uint8(255), scaled)
    return Image.fromarray(scaled)


def _has_end(source: Any) -> bool:
    """Whether JPEG 2000 has its closing mark, which its data never contain; its decoder does not ask for it."""
    source.seek(0)
    return b"\xff\xd9" in source.read()
