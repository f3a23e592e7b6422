"""Files to pixels: what is read, how it is turned and flattened, and what is refused with which reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import encode, noise, photo, pixels, psnr_db, tiles
from PIL import ExifTags, Image, TiffImagePlugin

from tlearn.data.decode import FORMATS, UnreadableImageError, as_bmp, frames_of, load_rgb, open_image, upright_size

Picture = npt.NDArray[np.uint8]
UPRIGHT = tiles(0, columns=5, rows=3)
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}
# how a camera stores an upright picture under each EXIF orientation (CIPA DC-008, 4.6.4 A)
STORED_AS: dict[int, Callable[[Picture], Picture]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif.tobytes()


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, four bytes of value), whether it makes sense or not."""
    rows = b"".join(struct.pack("<HHI4s", tag, kind, count, value) for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a picture of this size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def decode_like_a_transform(data: bytes) -> Image.Image:
    """The size first, then only as many pixels as are needed."""
    image = open_image(data)
    upright_size(image)
    return load_rgb(image, cover=(5, 5))


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_are_read_exactly(format: str) -> None:
    original = noise(1, 37, 23)
    data = encode(original, format, **LOSSLESS[format])
    assert open_image(data).format == format
    assert (pixels(data) == np.asarray(original)).all()


@pytest.mark.parametrize(("format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})])
def test_lossy_formats_are_read_nearly(format: str, options: dict[str, Any]) -> None:
    original = photo().resize((320, 214))
    data = encode(original, format, quality=90, **options)
    assert psnr_db(pixels(data), np.asarray(original)) > 28


def test_a_jpeg_with_more_pictures_behind_it_is_its_first_one() -> None:
    first, second = Image.fromarray(UPRIGHT), Image.fromarray(255 - UPRIGHT)
    data = encode(first, "MPO", save_all=True, append_images=[second], quality=95, subsampling=0)
    image = open_image(data)
    assert FORMATS[str(image.format)] == "jpg"
    assert np.abs(pixels(data) - UPRIGHT).mean() < 3
    small = np.asarray(load_rgb(open_image(data), cover=(40, 24)))
    assert small.shape == (24, 40, 3)
    assert np.abs(small.astype(int) - UPRIGHT[::2, ::2]).mean() < 3


@pytest.mark.parametrize("value", STORED_AS)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_rotated_lossless_files_come_out_upright(format: str, value: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[value](UPRIGHT)))
    data = encode(stored, format, exif=orientation(value), **LOSSLESS[format])
    assert upright_size(open_image(data)) == (80, 48)
    assert (pixels(data) == UPRIGHT).all()


@pytest.mark.parametrize("value", STORED_AS)
def test_rotated_jpegs_come_out_upright_also_when_decoded_small(value: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[value](UPRIGHT)))
    data = encode(stored, "JPEG", exif=orientation(value), quality=95, subsampling=0)
    assert upright_size(open_image(data)) == (80, 48)
    assert np.abs(pixels(data) - UPRIGHT).mean() < 3
    small = np.asarray(load_rgb(open_image(data), cover=(20, 12)))
    assert small.shape == (12, 20, 3)
    assert np.abs(small.astype(int) - UPRIGHT[2::4, 2::4]).mean() < 3


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_ignored(value: int) -> None:
    data = encode(Image.fromarray(UPRIGHT), "PNG", exif=orientation(value))
    assert (pixels(data) == UPRIGHT).all()


def test_the_orientation_is_applied_once() -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[6](UPRIGHT)))
    rgb = load_rgb(open_image(encode(stored, "PNG", exif=orientation(6))))
    again = encode(rgb, "PNG", exif=rgb.getexif().tobytes())
    assert (pixels(again) == UPRIGHT).all()


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param((0x011A, 2, 4, b"abc\0"), id="a resolution that is text"),
        pytest.param((0x0128, 2, 4, b"abc\0"), id="a resolution unit that is text"),
        pytest.param((0x010F, 5, 1, b"\x08\0\0\0"), id="a camera maker that is a fraction"),
        pytest.param((0x8769, 4, 1, b"\xff\xff\xff\x7f"), id="a block beyond the end"),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on such blocks
def test_a_rotated_picture_survives_nonsense_in_its_exif_block(format: str, entry: tuple[int, int, int, bytes]) -> None:
    rotated = (0x0112, 3, 1, b"\x06\0\0\0")
    block = exif_block(*sorted([rotated, entry]))
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[6](UPRIGHT)))
    options = LOSSLESS.get(format, {"quality": 95, "subsampling": 0})
    data = encode(stored, format, exif=block, **options)
    assert np.abs(pixels(data) - UPRIGHT).mean() < 3


@settings(max_examples=150, deadline=None, derandomize=True)
@example([(65, 0)])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(damage: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    exif[ExifTags.Base.XResolution] = 72.0
    data = bytearray(encode(noise(0, 24, 16), "JPEG", exif=exif.tobytes()))
    for at, value in damage:
        data[at % len(data)] = value
    with suppress(UnreadableImageError):
        decode_like_a_transform(bytes(data))


def test_rgba_shows_white_where_it_is_transparent() -> None:
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 128)
    rgba[1, 1] = (255, 0, 0, 51)
    for format in ("PNG", "WEBP"):
        got = pixels(encode(Image.fromarray(rgba), format, **LOSSLESS[format], exact=True))
        assert got[0, 0].tolist() == [10, 20, 30]
        assert got[0, 1].tolist() == [255, 255, 255]
        assert np.abs(got[1, 0] - 127).max() <= 1
        assert np.abs(got[1, 1] - [255, 204, 204]).max() <= 1


def test_grey_with_alpha_shows_white_where_it_is_transparent() -> None:
    la = np.array([[[0, 255], [0, 0]], [[100, 128], [255, 7]]], dtype=np.uint8)
    got = pixels(encode(Image.fromarray(la, "LA"), "PNG"))
    assert np.abs(got - np.array([[0, 255], [177, 255]])[..., None]).max() <= 1


def test_a_palette_with_a_transparent_entry_shows_white_there() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(encode(palette, "PNG")).tolist() == [[[200, 0, 0], [0, 200, 0]]]
    assert pixels(encode(palette, "PNG", transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    partly = pixels(encode(palette, "PNG", transparency=bytes([255, 51])))
    assert np.abs(partly - [[[200, 0, 0], [204, 244, 204]]]).max() <= 1


def test_a_colour_declared_transparent_shows_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(encode(image, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def tiff_tags(values: dict[int, int]) -> TiffImagePlugin.ImageFileDirectory_v2:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in values.items():
        tags[tag] = value
    return tags


@pytest.mark.parametrize(
    ("format", "options", "order"),
    [("PNG", {}, "<u2"), ("TIFF", {}, "<u2"), ("TIFF", {}, ">u2"), ("TIFF", {"compression": "tiff_lzw"}, "<u2")],
)
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str, options: dict[str, Any], order: str) -> None:
    grey = (np.arange(256) * 257).reshape(16, 16).astype(order)
    data = encode(Image.fromarray(grey), format, **options)
    assert open_image(data).mode.startswith("I;16")
    assert (pixels(data) == np.arange(256).reshape(16, 16, 1)).all()


def test_a_tiff_whose_white_is_zero_is_turned_round() -> None:
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    data = encode(Image.fromarray(grey), "TIFF", tiffinfo=tiff_tags({262: 0}))
    assert (pixels(data) == 255 - np.arange(256).reshape(16, 16, 1)).all()


def test_twelve_bit_grey_is_scaled_by_its_own_white() -> None:
    """Packed by hand, two values in three bytes: Pillow reads these files and does not write them."""
    values = np.arange(256) * 16
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 16, 279: len(packed)}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + rows + struct.pack("<I", 0)
    data += bytes(122 - len(data)) + packed
    assert open_image(data).mode == "I;16"
    assert np.abs(pixels(data)[..., 0].ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_an_unknown_range_are_refused(kind: type) -> None:
    data = encode(Image.fromarray(np.ones((4, 4), dtype=kind)), "TIFF")
    with pytest.raises(UnreadableImageError, match="unknown range; convert them to 8 or 16 bits"):
        pixels(data)


def test_a_tiff_that_begins_with_a_preview_is_refused() -> None:
    """As raw files of many cameras do: what Pillow would show is a thumbnail."""
    with pytest.raises(UnreadableImageError, match="preview"):
        open_image(encode(noise(1), "TIFF", tiffinfo=tiff_tags({254: 1})))


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_first_of_several_frames_is_decoded_and_all_are_counted(format: str, n: int) -> None:
    frames = [Image.fromarray(UPRIGHT).quantize(16), *(noise(i, 80, 48).quantize(16) for i in range(1, n))]
    options = {"save_all": True, "append_images": frames[1:]} if n > 1 else {}
    data = encode(frames[0], format, **options, **LOSSLESS.get(format, {}))
    assert frames_of(data) == n
    assert (pixels(data) == np.asarray(frames[0].convert("RGB"))).all()


def test_a_gif_shows_white_where_it_is_transparent() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(encode(palette, "GIF", transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16"])
def test_a_picture_without_a_file_becomes_one_that_is_decoded_alike(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    else:
        image = noise(4, 21, 10).convert(mode)
    assert (pixels(as_bmp(image)) == pixels(encode(image, "PNG"))).all()
    assert as_bmp(image)[:2] == b"BM"


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_grey_becomes_three_equal_channels(format: str, mode: str) -> None:
    image = noise(3, 20, 10).convert(mode)
    got = pixels(encode(image, format))
    assert (got == np.asarray(image.convert("L"))[..., None]).all()


def test_a_grey_jpeg_becomes_three_equal_channels() -> None:
    image = Image.fromarray(UPRIGHT).convert("L")
    got = pixels(encode(image, "JPEG", quality=95))
    assert (got == got[..., :1]).all()
    assert np.abs(got[..., 0] - np.asarray(image)).mean() < 2


def test_a_cmyk_jpeg_has_the_colours_it_was_saved_with() -> None:
    cmyk = Image.fromarray(UPRIGHT).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    assert open_image(data).mode == "CMYK"
    assert np.abs(pixels(data) - np.asarray(cmyk.convert("RGB"))).mean() < 4


def test_covering_decode_of_a_large_jpeg_is_small_enough_and_large_enough() -> None:
    original = photo()
    data = encode(original, "JPEG", quality=95)
    full = np.asarray(load_rgb(open_image(data)))
    for cover, expected in {(80, 53): (80, 54), (81, 50): (160, 107), (100.5, 70.2): (160, 107)}.items():
        small = load_rgb(open_image(data), cover=cover)
        assert small.size == expected
        scale, rows = 640 // expected[0], expected[1] - 1  # the last row is not a whole one
        reference = Image.fromarray(full[: rows * scale]).resize((expected[0], rows), Image.Resampling.BOX)
        assert psnr_db(np.asarray(small)[:rows], np.asarray(reference)) > 33
    for cover in ((321, 10), (10, 214), (2000, 2000)):
        assert (np.asarray(load_rgb(open_image(data), cover=cover)) == full).all()


def test_covering_decode_of_other_formats_is_the_whole_picture() -> None:
    original = noise(5, 90, 60)
    image = load_rgb(open_image(encode(original, "PNG")), cover=(9, 6))
    assert (np.asarray(image) == np.asarray(original)).all()


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_a_file_cut_short_is_refused(format: str, options: dict[str, Any]) -> None:
    data = encode(noise(2, 40, 30), format, **options)
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
        cut = data[: int(len(data) * share)]
        with pytest.raises(UnreadableImageError, match=r"cannot be decoded|broken header|known format"):
            load_rgb(open_image(cut))
        with pytest.raises(UnreadableImageError):
            decode_like_a_transform(cut)


def test_a_file_without_bytes_is_empty() -> None:
    with pytest.raises(UnreadableImageError, match=r"^empty file$"):
        open_image(b"")


@pytest.mark.parametrize(
    "data",
    [b"hello, I am a text file\n" * 20, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0", b"\xff\xd8", b"BM"],
)
def test_what_is_no_image_is_refused_with_the_list_of_formats(data: bytes) -> None:
    with pytest.raises(UnreadableImageError, match=r"(JPEG.*PNG.*WEBP.*BMP|broken header)"):
        open_image(data)


@pytest.mark.parametrize("format", ["ICO", "PPM"])
def test_other_image_formats_are_refused_with_the_list_of_formats(format: str) -> None:
    with pytest.raises(UnreadableImageError, match=r"not an image of a known format \(JPEG, .*BMP, TIFF, GIF\)"):
        open_image(encode(noise(1, 32, 32), format))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(UnreadableImageError, match=r"too large: .*3600000000 pixels"):
        open_image(png_header(60_000, 60_000))
    with pytest.raises(UnreadableImageError, match="too large"):  # Pillow would only warn
        open_image(png_header(10_000, 10_000))


def test_bomb_limits_of_the_process_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UnreadableImageError):
        open_image(png_header(60_000, 60_000))
    assert before == Image.MAX_IMAGE_PIXELS
    assert open_image(png_header(3, 3)).size == (3, 3)


def test_a_header_without_pixels_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        load_rgb(open_image(png_header(300, 300)))
    with pytest.raises(UnreadableImageError):
        load_rgb(open_image(png_header(0, 300)))


def test_what_pillow_reads_we_read_alike() -> None:
    data = encode(photo().resize((64, 43)), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert (pixels(data) == np.asarray(image.convert("RGB"))).all()
