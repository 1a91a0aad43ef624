"""CLIP's tower agrees with transformers', its files load strictly, and images and boxes go through the same geometry."""

import io
import json
import random

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_vit import CLIPVisionConfig, CLIPVisionTower, open_image, preprocess
from coords import GEOMETRIES, CoordFormat

SQUARE, SMALL = CLIPVisionConfig(image_size=224), CLIPVisionConfig(image_size=28)


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# ----- the tower


def test_the_tower_matches_the_reference():
    """Patches equal transformers' hidden_states[-2] without the class token, to 1e-5 of the largest."""
    reference = load_file(GOLDEN / "clip/reference.safetensors")
    with torch.inference_mode():
        patches = CLIPVisionTower.from_pretrained(GOLDEN / "clip")(reference["pixel_values"])
    assert patches.shape == (2, 4, 32)
    assert (patches - reference["patches"]).abs().max() <= 1e-5 * reference["patches"].abs().max()


def test_a_whole_clip_checkpoint_gives_the_same_tower(tmp_path):
    """The hub's files name the tower vision_model.*, hold a text tower beside it, and a vision_config in config.json."""
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(GOLDEN / "clip/model.safetensors").items()}
    other = {
        "text_model.final_layer_norm.weight": torch.ones(3),
        "logit_scale": torch.ones(1),
        "visual_projection.weight": torch.ones(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(5),
    }
    save_file({**tensors, **other}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip", "vision_config": ' + (GOLDEN / "clip/config.json").read_text() + "}"
    )
    whole, alone = CLIPVisionTower.from_pretrained(tmp_path), CLIPVisionTower.from_pretrained(GOLDEN / "clip")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    "harm, hint",
    [
        (lambda tensors: tensors.pop("pre_layrnorm.weight"), "missing: pre_layrnorm.weight"),
        (
            lambda tensors: tensors.update({"pre_layernorm.weight": torch.ones(32)}),
            "pre_layernorm.weight are no tensors of a CLIP",
        ),
        (
            lambda tensors: tensors.update({"embeddings.class_embedding": torch.ones(31)}),
            r"another shape: embeddings.class_embedding \(31,\), expected \(32,\)",
        ),
    ],
)
def test_a_wrong_weight_file_is_refused_by_the_name_of_the_tensor(tmp_path, harm, hint):
    """Missing, unexpected and misshapen tensors: nothing is loaded in silence."""
    tensors = load_file(GOLDEN / "clip/model.safetensors")
    harm(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "clip/config.json").read_text())
    with pytest.raises(ValueError, match=hint):
        CLIPVisionTower.from_pretrained(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    """No config, a cut config, no weights, cut weights: the message names the file."""
    with pytest.raises(FileNotFoundError, match="config.json"):
        CLIPVisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        CLIPVisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "clip/config.json").read_text())
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        CLIPVisionTower.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "clip/model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        CLIPVisionTower.from_pretrained(tmp_path)


def test_shapes_that_the_tower_lacks_are_refused():
    """Another activation, sides and widths that do not divide, an image of another side."""
    for options, hint in (
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"image_size": 225}, "image_size 225"),
        ({"num_attention_heads": 7}, "hidden_size 1024"),
    ):
        with pytest.raises(ValueError, match=hint):
            CLIPVisionConfig(**options)
    with pytest.raises(ValueError, match=r"not \(B, 3, 28, 28\)"):
        CLIPVisionTower.from_pretrained(GOLDEN / "clip")(torch.zeros(1, 3, 42, 42))


def test_the_image_processor_of_a_checkpoint_is_obeyed(tmp_path):
    """Its mean and std are the tower's; a side that is not the tower's, or a mean that is no colour, is refused."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / "clip" / name).read_bytes())
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1], "size": {"shortest_edge": 32}, "crop_size": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = CLIPVisionTower.from_pretrained(tmp_path).config
    assert preprocess(Image.new("RGB", (9, 5), "white"), config)[:, 0, 0].tolist() == [2, 1, 0.5]
    for changes, hint in (
        ({"crop_size": {"height": 32, "width": 32}}, "makes images of 32 px, the tower reads 28"),
        ({"do_center_crop": False}, "makes images of 32 px"),
        ({"crop_size": None}, "makes images of 32 px"),  # nothing is cropped, as SigLIP's processor
        ({"image_std": 0.5}, "image_std 0.5, which is not three numbers"),
    ):
        changed = {key: value for key, value in (processor | changes).items() if value is not None}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=hint):
            CLIPVisionTower.from_pretrained(tmp_path)


def test_what_a_config_leaves_out_is_vit_b_32():
    """transformers once wrote only what differs from its defaults, and those are ViT-B/32's."""
    config = CLIPVisionConfig.from_dict({"model_type": "clip_vision_model"})
    assert CLIPVisionConfig.from_dict({"model_type": "clip_vision_model", "vision_config": None}) == config
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.num_patches) == (768, 12, 32, 49)
    assert [CLIPVisionConfig(image_size=side).num_patches for side in (224, 336)] == [256, 576]


# ----- images to pixels


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "size, box",
    [
        ((300, 200), (110, 40, 190, 150)),
        ((201, 333), (30, 120, 150, 200)),
        ((97, 61), (30, 11, 60, 50)),
        ((500, 499), (7, 100, 333, 444)),
    ],
)
def test_a_painted_box_is_found_where_coords_says(geometry, size, box):
    """White on black, brought to the square, lies within a pixel of unit_from_px: pixels and boxes share one geometry."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    pixels = preprocess(image, SQUARE, geometry)
    white = pixels[0] * SQUARE.image_std[0] + SQUARE.image_mean[0] > 0.6  # above the grey of the bars
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    found = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    expected = [224 * min(max(v, 0), 1) for v in CoordFormat("ivb", 224, geometry).unit_from_px(box, size)]
    assert found == pytest.approx(expected, abs=1.01)


def test_a_flipped_image_flips_its_box():
    """Mirrored pixels are the mirrored tensor, and a mirrored box is written with mirrored numbers."""
    image, box, size = noise((448, 224)), (40, 20, 200, 100), (448, 224)
    flipped = preprocess(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), SQUARE)
    assert (flipped - preprocess(image, SQUARE).flip(2)).abs().max() < 0.05  # a grey level or two of 256
    assert CoordFormat("ivb").encode_box(box, size) == "(20, 20, 100, 100)"
    assert CoordFormat("ivb").encode_box((448 - 200, 20, 448 - 40, 100), size) == "(124, 20, 204, 100)"


@pytest.mark.parametrize("size", [(64, 48), (48, 65), (101, 33), (28, 28), (30, 31), (200, 57)])
def test_crop_and_pad_equal_the_image_processors_of_clip_and_llava(size):
    """crop is transformers' CLIPImageProcessor; pad is LLaVA's expand2square before it. Odd sizes and enlargement included."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})

    def theirs(image):
        return torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))

    image, longer = noise(size), max(size)
    square = Image.new("RGB", (longer, longer), (122, 116, 104))
    square.paste(image, ((longer - size[0]) // 2, (longer - size[1]) // 2))
    assert (preprocess(image, SMALL, "crop") - theirs(image)).abs().max() < 1e-5
    assert (preprocess(image, SMALL, "pad") - theirs(square)).abs().max() < 1e-5


# ----- image files


def reopened(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return open_image(tmp_path / name)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """CMYK, greyscale, 16-bit, palette with transparency, alpha, one pixel: colours as they look, not as they are stored."""
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    found = {
        "cmyk": reopened(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=100),
        "grey": reopened(tmp_path, Image.new("L", (16, 16), 77)),
        "bilevel": reopened(tmp_path, Image.new("1", (16, 16), 1)),
        "16 bit": reopened(tmp_path, Image.fromarray(np.full((16, 16), 0x8040, dtype=np.uint16))),
        "palette": reopened(tmp_path, palette, transparency=1),
        "alpha": reopened(tmp_path, Image.new("RGBA", (16, 16), (1, 2, 3, 0))),
        "grey alpha": reopened(tmp_path, Image.new("LA", (16, 16), (9, 0))),
        "one pixel": reopened(tmp_path, Image.new("RGB", (1, 1), (5, 6, 7))),
    }
    expected = {
        "cmyk": (200, 30, 40),
        "grey": (77,) * 3,
        "bilevel": (255,) * 3,
        "16 bit": (128,) * 3,
        "palette": (10, 20, 30),
        "alpha": (1, 2, 3),
        "grey alpha": (9,) * 3,
        "one pixel": (5, 6, 7),
    }
    for kind, image in found.items():
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == pytest.approx(expected[kind], abs=3), kind
        for geometry in GEOMETRIES:
            assert preprocess(image, SMALL, geometry).shape == (3, 28, 28)
    sixteen = Image.fromarray(np.full((16, 16), 0x8040, dtype=np.uint16))
    assert torch.equal(preprocess(sixteen, SMALL), preprocess(found["16 bit"], SMALL)), "opened by the caller"
    with pytest.raises(ValueError, match="unknown geometry 'Crop'"):
        preprocess(red, SMALL, "Crop")


def test_an_exif_rotation_is_not_followed(tmp_path):
    """COCO's boxes are in the stored orientation, and so is what we read."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    image = reopened(tmp_path, noise((30, 20)), "turned.jpg", exif=exif)
    assert Image.open(tmp_path / "turned.jpg").getexif()[0x0112] == 6
    assert image.size == (30, 20)


def test_what_is_no_whole_image_is_refused_by_name(tmp_path):
    """A cut JPEG, a text file, an empty file, floating-point pixels, a folder, nothing at all."""
    noise((64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("this is not a photo")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "float.tif"):
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / name)
    for name in ("missing.jpg", "folder.jpg"):
        with pytest.raises(FileNotFoundError, match=name):
            open_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_an_image_or_a_named_refusal(tmp_path):
    """Bytes lost or changed anywhere, in seven formats: whatever PIL makes of it, nobody meets an error without the file's name."""
    rng, path, refused = random.Random(0), tmp_path / "damaged.jpg", 0
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        noise((24, 31)).save(buffer, kind)
        for turn in range(60):
            data = bytearray(buffer.getvalue())
            if turn % 2:
                data = data[: rng.randrange(1, len(data))]
            for _ in range(turn % 3):
                data[rng.randrange(min(len(data), 60))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                assert open_image(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 100


def test_the_committed_tiny_tower_loads():
    """tiny/clip is read by the same strict loader as the 7B model's tower."""
    folder = ROOT / "tiny/clip"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no {folder}: python -m tiny.make_vision makes it")
    tower = CLIPVisionTower.from_pretrained(folder)
    patches = tower(preprocess(noise((50, 40)), tower.config)[None])
    assert patches.shape == (1, tower.config.num_patches, tower.config.hidden_size)
