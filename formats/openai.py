"""CLIP's image tower (Radford et al. 2021), without its text tower, and the way an image file becomes its input.

    image file --open_image--> PIL RGB --preprocess--> (3, S, S) --CLIPVisionTower--> patches (P, Dv)

Parameter names are those of HF `openai/clip-vit-*` under `vision_model.`, typo `pre_layrnorm` included, so that
checkpoints load strictly. What leaves the tower is what LLaVA uses: the patches of the last block but one, without the
class token and without `post_layernorm`. The last block is kept, so that a checkpoint can be written back, and not run.
"""

import hashlib
import io
import math
import os
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from checkpoint import build, open_tensors, read_config, require_file, sort_tensors
from coords import resized

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's training images, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of the tower, in the keys of HF config.json. The defaults are ViT-L/14 at 224 px."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        if self.hidden_act != "quick_gelu":
            raise ValueError(
                f"hidden_act {self.hidden_act!r}; expected 'quick_gelu', CLIP's own; this tower has no other"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size}; expected a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}; expected a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config):
        """Take what we know from a HF config, of the tower alone or of a whole CLIP (`vision_config`)."""
        config = config.get("vision_config", config)
        defaults = dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=32,
        )
        # HF leaves out of config.json what equals its own defaults, and those are ViT-B/32's
        return cls(**{**defaults, **{f.name: config[f.name] for f in fields(cls) if f.name in config}})

    @classmethod
    def from_shapes(cls, stored):
        """Read the shape off the tensors, for files without a config (OpenAI's, LLaVA's): heads are 64 wide in all CLIPs."""
        width, _, patch, _ = stored["embeddings.patch_embedding.weight"].shape
        positions = stored["embeddings.position_embedding.weight"].shape[0] - 1
        return cls(
            hidden_size=width,
            intermediate_size=stored["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len({name.split(".")[2] for name in stored if name.startswith("encoder.layers.")}),
            num_attention_heads=width // 64,
            image_size=patch * math.isqrt(positions),
            patch_size=patch,
        )


# ----- images

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError)  # damaged; RuntimeError: encrypted


def open_image(path):
    """Open an image file as RGB, in its stored orientation (COCO's boxes ignore the EXIF rotation, and so do we).

    Greyscale, palette, CMYK and 16-bit greyscale become RGB; transparency is dropped, as CLIP's own reader does.
    `path` may lead into a zip: images.zip/000000000.jpg. Raises FileNotFoundError, or ValueError naming a file that is
    not a whole image.
    """
    if not has_image(path):
        raise FileNotFoundError(
            f"no image file {path}; expected a JPEG, PNG or other image; check the folder and the name"
        )
    try:
        with image_file(path) as file, Image.open(file) as image:
            image.load()
            if image.mode.startswith("I"):  # 16-bit greyscale: PIL's own conversion would clip it to white
                return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert(
                    "RGB"
                )
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, not 8 or 16 bit")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, *ZIP_ERRORS) as error:  # all PIL's
        raise ValueError(
            f"{path} cannot be read as an image ({error}); expected a whole image file; replace or leave it out"
        ) from None


def in_zip(path):
    """Take apart a path that leads into a zip: (zip, name inside), or (None, None)."""
    for parent in Path(path).parents if ".zip" in str(path) else ():
        if parent.suffix == ".zip" and parent.is_file():
            return parent, Path(path).relative_to(parent).as_posix()
    return None, None


@lru_cache(maxsize=8)
def open_zip(path):
    """Open a zip once, to be read by any thread."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip ({error}); expected one; download or copy it again") from None


def image_file(path):
    """Open an image's file to read its bytes, in its folder or its zip."""
    zip_path, member = in_zip(path)
    return io.BytesIO(open_zip(zip_path).read(member)) if zip_path else open(path, "rb")


def has_image(path):
    """Say whether an image file is there, in its folder or its zip."""
    zip_path, member = in_zip(path)
    return member in open_zip(zip_path).NameToInfo if zip_path else Path(path).is_file()


def image_size(path):
    """Look at an image file without decoding it: (width, height). The whole file is read only where its end looks wrong.

    Raises what open_image raises. A file damaged between its head and its end is not found out here.
    """
    zip_path, member = in_zip(path)
    if not has_image(path):
        return open_image(path).size
    try:
        if zip_path:  # which holds a checksum
            with Image.open(io.BytesIO(open_zip(zip_path).read(member))) as image:
                return image.size
        with open(path, "rb") as file, Image.open(path) as image:
            file.seek(-min(12, os.fstat(file.fileno()).st_size), os.SEEK_END)
            end = file.read()
            whole = end.endswith(b"\xff\xd9") if image.format == "JPEG" else b"IEND" in end and image.format == "PNG"
            return image.size if whole else open_image(path).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, *ZIP_ERRORS):
        return open_image(path).size  # which says what is wrong


def preprocess(image, side, geometry="squash"):
    """Bring a PIL image to the model's square and normalise it: float32 (3, side, side).

    The rectangle that the square shows is `coords.window`, so boxes follow. Resampling is bicubic; `pad` fills with
    CLIP's mean colour, as LLaVA-1.5; `crop` resizes the shorter edge and cuts the middle, as CLIPImageProcessor.
    """
    image = image.convert("RGB")
    if geometry == "pad":
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), tuple(int(255 * m) for m in MEAN))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        image = square
    if geometry == "crop":
        image = image.resize(resized(image.size, side), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ----- the tower


class Embeddings(nn.Module):
    """Pixels (B, 3, S, S) -> (B, 1 + P, Dv): the class token, then the patches, each with its position."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, P, Dv), row by row
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 1 + P, Dv)


class Attention(nn.Module):
    """x (B, 1 + P, Dv) -> the same shape; all see all."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """x (B, 1 + P, Dv) -> the same shape."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # QuickGELU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPVisionTower(nn.Module):
    """CLIP's ViT up to the features that LLaVA reads."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values):
        """Normalised images (B, 3, S, S) -> patches (B, P, Dv): hidden_states[-2] without the class token."""
        side = self.config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"images of shape {tuple(pixel_values.shape)}; expected (B, 3, {side}, {side}); use clip_vit.preprocess"
            )
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        for block in self.encoder["layers"][:-1]:
            x = block(x)
        return x[:, 1:]

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a HF folder that holds CLIP's vision tower, alone or beside other parts, or OpenAI's .pt state dict."""
        if Path(path).is_file():
            stored = openai_tensors(open_tensors(path), path)
            config = CLIPVisionConfig.from_shapes(stored)
        else:
            config = CLIPVisionConfig.from_dict(read_config(path))
            stored = sort_tensors(open_tensors(path), path)["vision_tower"]
        return build(lambda: cls(config), stored, path, dtype, device)


def fingerprint(tower):
    """Name a tower by its weights: sha256 over all of them, as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Features:
    """What the frozen tower makes of every image or clip of a data set, on disk: features.npy (images, P, Dv), float16, mapped.

    features.json names the tower (`fingerprint`), side, geometry and frames of a clip it was made with, the row of each
    image, and the images that could not be read; `prepare.py features` writes both.
    """

    def __init__(self, folder, side, geometry, frames=0, tower=None):
        about = read_config(folder, "features.json")
        made = {"side": side, "geometry": geometry, "frames": frames} | ({"tower": fingerprint(tower)} if tower else {})
        for key, wanted in made.items():
            if about[key] != wanted:
                raise ValueError(
                    f"{folder} was made with {key} {about[key]}; expected {wanted}, as in this run; make it anew: prepare.py features"
                )
        self.folder, self.places = folder, {name: place for place, name in enumerate(about["images"])}
        self.left_out = set(about.get("left_out", ()))
        self.rows = np.load(require_file(Path(folder) / "features.npy", "the features"), mmap_mode="r")

    def place(self, image):
        """The row of an image file; of none, None."""
        place = image and self.places.get(os.path.abspath(image))
        if image and place is None:
            raise ValueError(
                f"{self.folder} lacks {image}; expected every image of the run; make them: prepare.py features"
            )
        return place

    def holds(self, image):
        """Say whether an image file could be read when this was made (no image at all is no loss); refuse one not of this folder."""
        self.place(image)
        return not image or os.path.abspath(image) not in self.left_out

    def read(self, image):
        """The patches (P, Dv) of an image file."""
        return torch.from_numpy(self.rows[self.place(image)].astype(np.float32))


def openai_tensors(stored, source):
    """Keep the tower of OpenAI's state dict, under our names: name -> Stored."""
    if "visual.conv1.weight" not in stored:
        raise ValueError(
            f"{source} has no visual.conv1.weight; expected the state dict of OpenAI's CLIP with a ViT; give the folder of "
            "any other CLIP, with its config.json"
        )
    ours = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.": "embeddings.patch_embedding.",
        "ln_pre.": "pre_layrnorm.",
        "ln_post.": "post_layernorm.",
        "transformer.resblocks.": "encoder.layers.",
        ".attn.": ".self_attn.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".c_fc.": ".fc1.",
        ".c_proj.": ".fc2.",
    }
    tower = {}
    for name, tensor in stored.items():
        if not name.startswith("visual.") or name == "visual.proj":
            continue
        name = name.removeprefix("visual.")
        for theirs, our in ours.items():
            name = name.replace(theirs, our)
        if ".in_proj_" in name:  # query, key and value in one matrix
            width = tensor.shape[0] // 3
            for number, part in enumerate(("q_proj.", "k_proj.", "v_proj.")):
                tower[name.replace("in_proj_", part)] = tensor.rows(number * width, (number + 1) * width)
        else:
            tower[name] = tensor
    return tower
