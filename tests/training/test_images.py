"""Pictures of every kind come out as they look, or are a fault of the picture in one line."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from gcl_kernels.training.data import MOST_PIXELS, ImageCheck, ImageError, image_fault, load_image

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
LINEAR = (RAMP / 65535 * 255).round().astype(int)


def grey(path):
    pixels = np.asarray(load_image(path)).astype(int)
    assert pixels.shape[2] == 3
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_grey_of_16_bits_is_the_linear_ramp(tmp_path):
    pgm = tmp_path / "ramp.pgm"
    pgm.write_bytes(b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes())
    paths = [saved(tmp_path / "ramp.png", RAMP), saved(tmp_path / "ramp.tif", RAMP),
             saved(tmp_path / "big-endian.tif", RAMP.astype(">u2")), pgm]  # fmt: skip
    for path in paths:
        assert abs(grey(path) - LINEAR).max() <= 1, path
        assert (grey(path).min(), grey(path).max()) == (0, 255), path


def test_grey_of_10_bits_is_the_linear_ramp(tmp_path):
    path = tmp_path / "ramp.pgm"
    path.write_bytes(b"P5 32 32 1023\n" + np.arange(1024).astype(">u2").tobytes())
    expected = np.rint(np.arange(1024).reshape(32, 32) / 1023 * 255)
    assert abs(grey(path) - expected).max() <= 1


def test_tiff_says_which_end_is_white(tmp_path):
    path = saved(tmp_path / "ramp.tif", RAMP, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert (image.mode, image.tag_v2[262]) == ("I;16", 0)
    assert abs(grey(path) - (255 - LINEAR)).max() <= 1


def test_floats_from_0_to_1_are_the_linear_ramp_and_others_are_refused(tmp_path):
    floats = (RAMP / 65535).astype(np.float32)
    assert abs(grey(saved(tmp_path / "ramp.tif", floats)) - LINEAR).max() <= 1
    others = {"large": floats * 255, "negative": floats - 0.5, "nan": np.where(floats < 0.5, np.nan, floats)}
    for name, pixels in others.items():
        path = saved(tmp_path / f"{name}.tif", pixels.astype(np.float32))
        assert image_fault(path) == f"pixels of mode 'F' whose range is not known, '{path}'"
    path = saved(tmp_path / "integers.tif", RAMP.astype(np.int32) * 1000)
    assert image_fault(path) == f"pixels of mode 'I' whose range is not known, '{path}'"


def test_colours_of_16_bits_are_scaled(tmp_path):
    path = tmp_path / "colours.ppm"
    path.write_bytes(b"P6 1 1 65535\n" + np.array([0, 32768, 65535]).astype(">u2").tobytes())
    assert load_image(path).getpixel((0, 0)) in [(0, 127, 255), (0, 128, 255)]


def two_pixels(mode, first, second):
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return image


PALETTE = two_pixels("P", 0, 1)
PALETTE.putpalette([10, 20, 30, 40, 50, 60])


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (PALETTE, "a.png", {}, [(10, 20, 30), (40, 50, 60)]),
        (PALETTE, "a.png", {"transparency": 0}, [(255, 255, 255), (40, 50, 60)]),
        (PALETTE, "a.png", {"transparency": b"\x00\xff"}, [(255, 255, 255), (40, 50, 60)]),
        (PALETTE, "a.gif", {"transparency": 0}, [(255, 255, 255), (40, 50, 60)]),
        (two_pixels("LA", (50, 0), (60, 255)), "a.png", {}, [(255, 255, 255), (60, 60, 60)]),
        (two_pixels("L", 50, 60), "a.png", {"transparency": 50}, [(255, 255, 255), (60, 60, 60)]),
        (two_pixels("RGB", (1, 2, 3), (9, 8, 7)), "a.png", {"transparency": (1, 2, 3)}, [(255, 255, 255), (9, 8, 7)]),
        (two_pixels("RGBA", (1, 2, 3, 0), (9, 8, 7, 255)), "a.png", {}, [(255, 255, 255), (9, 8, 7)]),
        (two_pixels("1", 0, 255), "a.png", {}, [(0, 0, 0), (255, 255, 255)]),
        (two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "a.tif", {}, [(255, 0, 0), (0, 0, 0)]),
        (Image.fromarray(np.array([[25700, 51400]], np.uint16)), "a.png", {"transparency": 25700},
         [(255, 255, 255), (200, 200, 200)]),
    ],
)  # fmt: skip
def test_every_mode_looks_as_on_a_white_page(tmp_path, image, name, options, expected):
    image.save(tmp_path / name, **options)
    loaded = load_image(tmp_path / name)
    assert (loaded.mode, loaded.size) == ("RGB", (2, 1))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == expected


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif", "a.webp"])
def test_the_first_of_several_frames_counts(tmp_path, name):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, save_all=True, append_images=[blue])
    assert abs(np.array(load_image(tmp_path / name).getpixel((4, 4))) - (255, 0, 0)).max() <= 2


def test_the_note_on_how_a_camera_was_held_is_not_followed(tmp_path):
    image = two_pixels("RGB", (255, 0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").tobytes() == image.tobytes()


NOISE = Image.effect_noise((24, 24), 60).convert("RGB")


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp", "tif", "avif", "jp2", "ppm", "tga", "ico"])
def test_a_picture_cut_short_is_a_fault_or_has_every_pixel(tmp_path, ending):
    path, cut = tmp_path / f"a.{ending}", tmp_path / f"cut.{ending}"
    try:
        NOISE.save(path)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write {ending}: {error}")
    content, whole = path.read_bytes(), load_image(path).tobytes()
    for length in sorted({*range(0, len(content), 37), *range(len(content) - 12, len(content)), 209}):
        cut.write_bytes(content[:length])
        fault = image_fault(cut)
        assert fault == f"a file that cannot be decoded, '{cut}'" or load_image(cut).tobytes() == whole, length


@pytest.mark.parametrize(
    "kind",
    [RuntimeError, SyntaxError, MemoryError, RecursionError, IndexError, KeyError, AttributeError, ZeroDivisionError],
)
def test_whatever_a_decoder_raises_is_a_fault_of_the_picture(tmp_path, monkeypatch, kind):
    NOISE.save(tmp_path / "a.png")

    def load(self):
        raise kind("in a decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert image_fault(tmp_path / "a.png") == f"a file that cannot be decoded, '{tmp_path / 'a.png'}'"


def test_a_damaged_avif_is_a_fault(tmp_path):
    path = tmp_path / "a.avif"
    try:
        NOISE.save(path)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write avif: {error}")
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))
    assert image_fault(path) == f"a file that cannot be decoded, '{path}'"


def test_pictures_too_large_are_faults_before_they_are_decoded(tmp_path):
    NOISE.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for side in (9_500, 14_000, 2_000_000):  # above Pillow's limit, and above twice that
        path = tmp_path / f"{side}.png"
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
        assert side * side > MOST_PIXELS
        assert image_fault(path) == f"a picture of more than 89,478,485 pixels, '{path}'"


def test_what_is_no_file_is_a_fault_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    expected = {
        str(tmp_path / "pipe"): f"a pipe in place of a file, '{tmp_path / 'pipe'}'",
        "/dev/zero": "a device in place of a file, '/dev/zero'",
        str(tmp_path): f"a folder in place of a file, '{tmp_path}'",
        str(tmp_path / "none"): f"no file '{tmp_path / 'none'}'",
        "a\0b": "a file that cannot be opened ('embedded null byte'), 'a\\x00b'",
        f"{tmp_path}/https:/host/a.png": "a URL, which is not fetched, 'https://host/a.png'",
    }
    for path, fault in expected.items():
        assert image_fault(path) == fault
        assert ImageCheck("exists")(path), path
    long = image_fault("x" * 5000)
    assert long.startswith("a file that cannot be opened ('File name too long'), 'xxx")
    assert len(long) < 400


def test_no_other_program_is_run(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "cannot be decoded" in image_fault(tmp_path / "a.eps")


def test_a_part_of_a_tar_file_and_a_file_of_that_name(tmp_path):
    buffer = io.BytesIO()
    NOISE.save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(buffer.getvalue())
        archive.addfile(member, io.BytesIO(buffer.getvalue()))
    assert load_image(f"{tmp_path}/a.tar@512+{member.size}").tobytes() == NOISE.tobytes()
    for part in ("512+99999999", f"{10**30}+5", f"5+{10**30}"):
        assert "cannot be opened ('fewer bytes than that')" in image_fault(f"{tmp_path}/a.tar@{part}")
    NOISE.save(tmp_path / "a@1+2", "PNG")
    assert load_image(tmp_path / "a@1+2").tobytes() == NOISE.tobytes()
    assert ImageCheck("exists")(str(tmp_path / "a@1+2")) is None
    with pytest.raises(ImageError, match="no file"):
        load_image(tmp_path / "b.tar@1+2")
