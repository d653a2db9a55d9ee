"""Image files: which formats are read, how their levels become 8 bits, what is refused."""

import warnings

import numpy as np
import pytest
from PIL import Image

from images import image_paths, load_image, open_image
from runtime import InputError, fingerprint

GRAY = np.linspace(0, 65535, 1024).reshape(32, 32)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("16.png", GRAY.astype(np.uint16)),
        ("16.tif", GRAY.astype(np.uint16)),
        ("16.pgm", GRAY.astype(np.uint16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gray_levels_are_scaled_from_16_bits(tmp_path, name, levels):
    Image.fromarray(levels).save(tmp_path / name)
    pixels = np.asarray(load_image(tmp_path / name)).astype(float)
    np.testing.assert_allclose(pixels, np.repeat(GRAY[..., None] / 257, 3, -1), atol=0.51)


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray((GRAY / 257).astype(np.uint16)).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name)).max() == 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_gray_levels_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(GRAY.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif cannot be decoded: gray levels of 32 .* as 8"):
        load_image(tmp_path / "a.tif")


def drawing(mode):
    """A black square on transparency."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:16, 8:16, 3] = 255
    return Image.fromarray(rgba).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGBA"), ("a.webp", "RGBA"), ("a.png", "LA"), ("a.gif", "RGBA")]
)
def test_transparent_places_are_white(tmp_path, name, mode):
    drawing(mode).save(tmp_path / name, lossless=True)
    pixels = np.asarray(load_image(tmp_path / name))
    assert (pixels[8:16, 8:16] == 0).all() and (pixels[:8] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_one_transparent_level_is_white(tmp_path, mode):
    colour = (0, 0, 0) if mode == "RGB" else 0
    Image.new(mode, (8, 8), colour).save(tmp_path / "a.png", transparency=colour)
    assert (np.asarray(load_image(tmp_path / "a.png")) == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA"])
def test_opaque_images_of_8_bits_are_read_as_the_official_code_reads_them(tmp_path, mode):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.fromarray(noise).convert(mode).save(tmp_path / name)
    official = Image.open(tmp_path / name).convert("RGB")
    assert np.array_equal(np.asarray(load_image(tmp_path / name)), np.asarray(official))


def test_orientation_in_exif_is_not_applied_and_the_first_frame_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 10)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "kind", ["EPS", "ICO", "JPEG2000", "DDS", "TGA", "PDF", "ICNS", "PCX", "SGI", "IM"]
)
def test_other_formats_are_refused_whatever_the_file_is_called(tmp_path, kind):
    Image.new("RGB", (32, 32)).save(tmp_path / "a", format=kind)
    (tmp_path / "a").rename(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png cannot be read: it is none of PNG, JPEG"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(a) run\n",
        b"\xc5\xd0\xd3\xc6" + bytes(26) + b"%!PS-Adobe-3.0 EPSF-3.0\n",  # with a DOS header
        b"\xd7\xcd\xc6\x9a" + bytes(36),  # WMF
        b"BLP2" + bytes(200),
        b"SIMPLE  =                    T" + b" " * 2850,  # FITS
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_what_other_programs_would_draw_is_refused(tmp_path, monkeypatch, content):
    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(f"subprocess.{name}", lambda *a, **k: pytest.fail("started a program"))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="a.png cannot be read: it is none of PNG, JPEG"):
        load_image(tmp_path / "a.png")


def test_missing_broken_and_huge_images_are_named(tmp_path, monkeypatch):
    for name in ("a.png", "x" * 300, "x\0.png", "."):
        with pytest.raises(InputError, match="no image"):
            load_image(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="a.png cannot be read"):
        load_image(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="b.png cannot be decoded"):
        load_image(tmp_path / "b.png")
    (tmp_path / "large.ppm").write_bytes(b"P4\n14500 13700\n")  # within the limit, not Pillow's
    with warnings.catch_warnings(action="error"):
        open_image(tmp_path / "large.ppm").close()
    (tmp_path / "large.ppm").write_bytes(b"P4\n14500 13800\n")
    with pytest.raises(InputError, match="large.ppm has more than 200000000 pixels"):
        open_image(tmp_path / "large.ppm")
    monkeypatch.setattr("images.MAX_BYTES", 14)
    with pytest.raises(InputError, match="large.ppm has more than 14 bytes"):
        open_image(tmp_path / "large.ppm")
    monkeypatch.undo()
    monkeypatch.setattr("images.MAX_PIXELS", 1000)
    (tmp_path / "b.png").write_bytes(whole)
    with pytest.raises(InputError, match="more than 1000 pixels"):
        load_image(tmp_path / "b.png")


def test_damaged_files_of_every_format_are_read_or_refused_by_name(tmp_path):
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"):
        noise.save(tmp_path / "good", format=kind)
        good = np.frombuffer((tmp_path / "good").read_bytes(), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[random.integers(0, len(bad), 4)] = random.integers(0, 256, 4)
            (tmp_path / "bad").write_bytes(bad[: random.integers(1, len(bad) + 1)].tobytes())
            try:
                assert load_image(tmp_path / "bad").mode == "RGB"
            except InputError as error:
                assert "bad" in str(error)


def test_a_link_cannot_leave_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "loop.png").symlink_to(tmp_path / "root" / "loop.png")
    with pytest.raises(InputError, match="line 1: image 'link.png' is no path within its root"):
        image_paths(tmp_path / "root", {"image": "link.png"}, "line 1")
    (path,) = image_paths(tmp_path / "root", {"image": "loop.png"}, "line 1")
    with pytest.raises(InputError, match="no image .*loop.png"):
        load_image(path)


@pytest.mark.parametrize("size", [0, 9])
def test_of_a_file_that_was_cut_off_the_error_says_so(tmp_path, size):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole", format="WEBP")
    (tmp_path / "part").write_bytes((tmp_path / "whole").read_bytes()[:size])
    with pytest.raises(InputError, match="part cannot be read: .*, or cut off; convert it, or"):
        load_image(tmp_path / "part")


@pytest.mark.parametrize("begin", ["", "data:image/png;base64,"])
def test_a_picture_in_the_place_of_its_name_is_told_in_a_line(tmp_path, begin):
    picture = begin + "iVBORw0KGgo/" * 1000
    with pytest.raises(InputError, match="line 1: image '[a-zA-Z]*.* is no path within") as refusal:
        image_paths(tmp_path, {"image": picture}, "line 1")
    assert len(str(refusal.value)) < 300


def test_a_key_follows_content_and_is_remembered_by_path_size_and_time(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"1" if name == "a" else b"2")
    keys = [fingerprint([tmp_path / name / "x.png"]) for name in ("a", "b", "a")]
    assert keys[0] == keys[2] != keys[1]
    (tmp_path / "a" / "x.png").write_bytes(b"3")
    assert fingerprint([tmp_path / "a" / "x.png"]) not in keys
