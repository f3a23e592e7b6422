"""What the model gets to see: the centre or the whole for evaluation, random crops for training, normalised."""

from __future__ import annotations

import io
import multiprocessing
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pictures import encode, noise, photo, psnr_db
from PIL import ExifTags, Image, TiffImagePlugin

from tlearn.data.decode import load_rgb, open_image
from tlearn.data.transforms import EvalTransform, Pixels, Preprocessing, TrainTransform, normalise
from tlearn.dataconfig import Augment

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Fit = Literal["crop", "pad", "squash"]


def preprocessing(size_px: int, **changes: Any) -> Preprocessing:
    values: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear"}
    return Preprocessing(size_px, **{**values, **changes})


def train_transform(size_px: int = 32, **changes: Any) -> TrainTransform:
    fit, grey = changes.pop("fit", "crop"), changes.pop("grey", False)
    return TrainTransform(preprocessing(size_px, fit=fit, grey=grey), Augment(**changes))


def flag(width: int = 400, height: int = 100) -> bytes:
    """A red quarter, two green ones, a blue one, from left to right."""
    image = Image.new("RGB", (width, height), GREEN)
    image.paste(RED, (0, 0, width // 4, height))
    image.paste(BLUE, (width * 3 // 4, 0, width, height))
    return encode(image, "PNG")


def ramps(width: int, height: int) -> bytes:
    """Red tells the column and green the row, so that a crop tells where it was cut."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return encode(Image.fromarray(image), "PNG")


def box_of(crop: Pixels) -> tuple[float, float, float, float, bool]:
    """(left, top, width, height, flipped) of a crop of `ramps`, in px of the source, good to about half a pixel."""
    size = crop.shape[1]
    middle = slice(size // 4, size - size // 4)
    at = np.arange(size)[middle] + 0.5
    columns, left = np.polyfit(at, crop[0].mean(axis=0)[middle] + 0.5, 1)
    rows, top = np.polyfit(at, crop[1].mean(axis=1)[middle] + 0.5, 1)
    flipped = columns < 0
    return left + columns * size if flipped else left, top, abs(columns) * size, rows * size, bool(flipped)


def at(image: Pixels, x: float, y: float) -> tuple[int, ...]:
    """The colour at a place, as shares of the width and height."""
    size = image.shape[1]
    return tuple(image[:, int(y * size), int(x * size)].tolist())


def test_evaluation_cuts_the_centre() -> None:
    left, top, width, height, flipped = box_of(EvalTransform(preprocessing(32))(ramps(256, 160)))
    assert (width, height) == (pytest.approx(140, abs=1.5), pytest.approx(140, abs=1.5))
    assert (left + width / 2, top + height / 2) == (pytest.approx(128, abs=0.6), pytest.approx(80, abs=0.6))
    assert not flipped


def test_evaluation_keeps_as_much_of_the_shorter_side_as_it_is_told() -> None:
    for crop_pct in (0.5, 1.0):
        for data in (ramps(256, 160), ramps(160, 256)):
            _, _, width, height, _ = box_of(EvalTransform(preprocessing(32, crop_pct=crop_pct))(data))
            assert (width, height) == (pytest.approx(160 * crop_pct, abs=1.5),) * 2


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_evaluation_is_the_same_whatever_the_seed(fit: Fit) -> None:
    transform, data = EvalTransform(preprocessing(24, fit=fit)), encode(noise(1, 60, 40), "PNG")
    assert (transform(data, 1) == transform(data, 2)).all()
    assert transform(data).shape == (3, 24, 24)
    assert transform(data).dtype == np.uint8


def test_fit_crop_of_a_wide_picture_shows_its_centre_only() -> None:
    image = EvalTransform(preprocessing(40, fit="crop"))(flag())
    assert (image == np.array(GREEN).reshape(3, 1, 1)).all()


def test_fit_squash_of_a_wide_picture_shows_all_of_it_out_of_proportion() -> None:
    image = EvalTransform(preprocessing(40, fit="squash"))(flag())
    for y in (0.0, 0.5, 0.99):
        assert [at(image, x, y) for x in (0.1, 0.3, 0.6, 0.9)] == [RED, GREEN, GREEN, BLUE]


@pytest.mark.parametrize("turned", [False, True])
def test_fit_pad_shows_all_of_it_in_proportion_between_white_borders(turned: bool) -> None:
    data = flag()
    if turned:
        data = encode(load_rgb(open_image(data)).transpose(Image.Transpose.TRANSPOSE), "PNG")
    image = EvalTransform(preprocessing(40, fit="pad"))(data)
    if turned:
        image = image.transpose(0, 2, 1)
    assert [at(image, x, 0.5) for x in (0.1, 0.3, 0.6, 0.9)] == [RED, GREEN, GREEN, BLUE]
    assert [at(image, x, y) for x in (0.0, 0.5, 0.99) for y in (0.0, 0.3, 0.7, 0.99)] == [WHITE] * 12
    assert at(image, 0.1, 0.42) == at(image, 0.1, 0.58) == RED


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (7, 2), (2000, 3)])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pictures_of_any_shape_become_squares_in_their_colour(width: int, height: int, fit: Fit) -> None:
    data = encode(Image.new("RGB", (width, height), RED), "PNG")
    images = [train_transform(16, fit=fit)(data, seed) for seed in range(5)]
    images.append(EvalTransform(preprocessing(16, fit=fit))(data))
    for image in images:
        assert image.shape == (3, 16, 16)
        assert image[0].min() > 250, "red itself, and the white of a border"
        if fit != "pad" or width == height:
            assert image[1:].max() == 0


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_training_is_a_function_of_the_bytes_and_the_seed(fit: Fit) -> None:
    data = encode(noise(1, 60, 40), "PNG")
    torch.manual_seed(1)
    once = [train_transform(fit=fit)(data, seed) for seed in range(12)]
    torch.manual_seed(2)
    shared = train_transform(fit=fit)
    again = [shared(data, seed) for seed in reversed(range(12))][::-1]
    assert all((a == b).all() for a, b in zip(once, again, strict=True))
    assert len({image.tobytes() for image in once}) == 12


def test_training_leaves_the_random_state_of_the_process_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    train_transform()(flag(), 5)
    assert (torch.random.get_rng_state() == before).all()


def test_training_gives_the_same_pixels_in_another_process() -> None:
    data, seed = encode(photo().resize((160, 107)), "JPEG"), 2**64 - 3
    here = train_transform()(data, seed)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply(train_transform(), (data, seed))
    assert (here == there).all()


def test_crops_cover_the_share_of_the_picture_and_have_the_shape_they_are_told() -> None:
    width, height, data = 256, 200, ramps(256, 200)
    transform = train_transform(32, scale=(0.2, 0.5), ratio=(0.5, 2.0), hflip=0)
    boxes = [box_of(transform(data, seed)) for seed in range(150)]
    shares = np.array([w * h / (width * height) for _, _, w, h, _ in boxes])
    ratios = np.array([w / h for _, _, w, h, _ in boxes])
    assert shares.min() > 0.195
    assert shares.max() < 0.51
    assert ratios.min() > 0.49
    assert ratios.max() < 2.05
    # and all of both ranges is used, shapes symmetrically
    assert shares.min() < 0.23
    assert shares.max() > 0.47
    assert abs(np.log(ratios).mean()) < 0.12
    assert ratios.min() < 0.6
    assert ratios.max() > 1.7


def test_crops_lie_everywhere_in_the_picture_and_never_beyond_it() -> None:
    data, transform = ramps(256, 200), train_transform(32, scale=(0.1, 0.3), hflip=0)
    boxes = np.array([box_of(transform(data, seed))[:4] for seed in range(150)])
    left, top = boxes[:, 0] / (256 - boxes[:, 2]), boxes[:, 1] / (200 - boxes[:, 3])
    for place in (left, top):
        assert place.min() > -0.02
        assert place.max() < 1.02
        assert np.histogram(place, bins=4, range=(-0.02, 1.02))[0].min() > 20, "38 expected"


def test_pictures_are_flipped_as_often_as_told() -> None:
    data = ramps(128, 128)
    for hflip, low, high in ((0.0, 0, 0), (0.3, 40, 80), (1.0, 200, 200)):
        transform = train_transform(12, hflip=hflip)
        assert low <= sum(box_of(transform(data, seed))[4] for seed in range(200)) <= high


def test_a_flip_mirrors_the_very_same_crop() -> None:
    data = encode(noise(4, 80, 60), "PNG")
    for seed in range(5):
        straight, mirrored = (train_transform(hflip=p)(data, seed) for p in (0.0, 1.0))
        assert (mirrored == straight[:, :, ::-1]).all()


def test_no_scaling_and_no_flip_is_the_whole_picture() -> None:
    data = flag()
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    for fit in ("pad", "squash"):
        expected = EvalTransform(preprocessing(40, fit=fit))(data)
        assert (train_transform(40, fit=fit, **whole)(data, 3) == expected).all()
    square = encode(noise(2, 50, 50), "PNG")
    expected = EvalTransform(preprocessing(40, crop_pct=1.0))(square)
    assert (train_transform(40, **whole)(square, 3) == expected).all()


def test_a_picture_too_wide_for_every_crop_gives_its_largest_one() -> None:
    data = ramps(256, 40)
    transform = train_transform(16, scale=(0.9, 1.0), hflip=0)
    for seed in range(20):
        left, _, width, height, _ = box_of(transform(data, seed))
        assert height == pytest.approx(40, abs=1.5)
        assert width == pytest.approx(40 * 4 / 3, abs=1.5)
        assert -1 < left < 256 - width + 1


def test_training_crops_of_a_padded_picture_may_show_the_border_and_squashed_ones_never() -> None:
    seen = {fit: set() for fit in ("pad", "squash")}
    for fit, colours in seen.items():
        for seed in range(20):
            image = train_transform(16, fit=fit)(flag(), seed)
            colours.update(at(image, x, y) for x in (0.0, 0.5, 0.99) for y in (0.0, 0.5, 0.99))
    assert WHITE in seen["pad"]
    assert {RED, GREEN, BLUE} <= seen["squash"]
    assert all(colour[0] + colour[1] + colour[2] in range(250, 262) for colour in seen["squash"])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size_px", [32, 64])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_decoding_for_the_crop_shows_what_decoding_everything_shows(fit: Fit, size_px: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    jpeg = encode(photo(), "JPEG", quality=95, exif=exif.tobytes())
    png = encode(load_rgb(open_image(jpeg)), "PNG")  # upright, and never decoded smaller than it is
    p = preprocessing(size_px, fit=fit, interpolation="bicubic")
    whole = EvalTransform(p)(png)
    assert psnr_db(EvalTransform(p)(jpeg), whole) > 33
    transform = TrainTransform(p, Augment())
    for seed in range(3):
        small, large = transform(jpeg, seed), transform(png, seed)
        assert psnr_db(small, large) > 33
        assert psnr_db(small, transform(png, seed + 1)) < 20, "another crop is another picture"


def test_decoding_for_the_crop_is_antialiased() -> None:
    """The reference is Pillow's own resize, which torchvision and timm use for PIL images."""
    jpeg = encode(photo(), "JPEG", quality=95)
    full = load_rgb(open_image(jpeg))
    side = full.height * 0.875
    box = ((full.width - side) / 2, (full.height - side) / 2, (full.width + side) / 2, (full.height + side) / 2)
    for name, filter in {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}.items():
        reference = np.asarray(full.resize((48, 48), filter, box=box)).transpose(2, 0, 1)
        got = EvalTransform(preprocessing(48, interpolation=name))(jpeg)
        assert psnr_db(got, reference) > 35
        aliased = np.asarray(full.resize((48, 48), Image.Resampling.NEAREST, box=box)).transpose(2, 0, 1)
        assert psnr_db(got, aliased) < 28


def test_the_interpolation_is_the_one_that_was_asked_for() -> None:
    data = encode(noise(1, 20, 20), "PNG")
    images = [
        EvalTransform(preprocessing(50, interpolation=name))(data)
        for name in ("nearest", "bilinear", "bicubic", "lanczos")
    ]
    assert len({image.tobytes() for image in images}) == 4
    assert set(np.unique(images[0])) <= set(np.unique(np.asarray(load_rgb(open_image(data)))))


def test_normalised_values_are_what_the_weights_expect() -> None:
    p = preprocessing(2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2) * 11
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (p.mean, p.std))
    expected = (images.double() / 255 - mean) / std
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        got = normalise(images, p, dtype)
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() < tolerance
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert images.flatten()[-1] == 253, "the batch of bytes is not written to"


def test_an_empty_batch_is_normalised_to_an_empty_batch() -> None:
    got = normalise(torch.empty(0, 3, 5, 5, dtype=torch.uint8), preprocessing(5), torch.float32)
    assert got.shape == (0, 3, 5, 5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_tiff_that_is_stored_sideways_is_cut_like_the_upright_picture(fit: Fit) -> None:
    upright = Image.open(io.BytesIO(flag()))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ExifTags.Base.Orientation] = 6
    tiff = encode(upright.transpose(Image.Transpose.ROTATE_90), "TIFF", tiffinfo=tags)
    transform = EvalTransform(preprocessing(32, fit=fit))
    assert (transform(tiff) == transform(flag())).all()
    draw = train_transform(fit=fit)
    assert all((draw(tiff, seed) == draw(flag(), seed)).all() for seed in range(5))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_train_and_predict_as_their_eight(format: str) -> None:
    grey = np.arange(64 * 64).reshape(64, 64) // 16
    sixteen = encode(Image.fromarray((grey * 257).astype(np.uint16)), format)
    eight = encode(Image.fromarray(grey.astype(np.uint8)), "PNG")
    transform = EvalTransform(preprocessing(32))
    assert (transform(sixteen) == transform(eight)).all()
