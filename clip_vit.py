"""CLIP's image tower (Radford et al. 2021) without its text tower, and how an image file becomes its input.

    image file --open_image--> PIL RGB --preprocess--> (3, S, S) --CLIPVisionTower--> patches (P, Dv)

Parameter names are those of HF `openai/clip-vit-*` under `vision_model.`, including the typo `pre_layrnorm`, so checkpoints
load strictly. The tower returns what LLaVA uses: the patches after the second-to-last block, without the class token and
without `post_layernorm`. The last block never runs; it is kept so that a checkpoint can be saved whole.

    B images   S image side in pixels   P patches   Dv hidden_size   H heads   K head size
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from coords import resized, window
from formats.files import known_fields, normalization, read_config, read_processor
from formats.images import open_image, to_rgb  # noqa: F401 (open_image: the first arrow above)
from formats.originals import original_clip
from formats.weights import build, open_tensors, sort_tensors


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
    hidden_act: str = "quick_gelu"  # OpenAI's; "gelu" of most later CLIPs
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's training images, RGB in [0, 1]
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        for name in ("image_mean", "image_std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; CLIPs have 'quick_gelu' or 'gelu'")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads")

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config, processor=None):
        """Read a HF config, of the tower or a whole CLIP (`vision_config`), and of its image processor. Ignore unknown keys."""
        config = config.get("vision_config") or config
        # HF leaves out of config.json what equals its own defaults, and those are ViT-B/32's
        defaults = {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 32,
        }  # fmt: skip
        fields = {**defaults, **known_fields(cls, config)}
        return cls(**{**fields, **normalization(processor or {}, fields["image_size"])})

    @classmethod
    def from_shapes(cls, stored):
        """Derive the config from the tensors' shapes, for files without one. K is 64, as OpenAI's (open_clip's may differ)."""
        width, _, patch, _ = stored["embeddings.patch_embedding.weight"].shape  # (Dv, 3, patch, patch)
        positions = stored["embeddings.position_embedding.weight"].shape[0] - 1
        return cls(
            hidden_size=width,
            intermediate_size=stored["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len({name.split(".")[2] for name in stored if name.startswith("encoder.layers.")}),
            num_attention_heads=width // 64,
            image_size=patch * math.isqrt(positions),
            patch_size=patch,
        )


def preprocess(image, config, geometry="squash"):
    """Turn a PIL image into the tower's input: float32 (3, S, S), normalised with the tower's own mean and std.

    The square shows the rectangle `coords.window`, so boxes follow. Resampling is bicubic. `pad` fills with the mean colour,
    as LLaVA-1.5; `crop` resizes the shorter edge and cuts out the middle, as CLIPImageProcessor.
    """
    side, image = config.image_size, to_rgb(image)
    x, y, width, height = window(image.size, geometry, side)
    if geometry == "pad":
        square = Image.new("RGB", (width, height), mean_colour(config))
        square.paste(image, (-x, -y))
        image = square
    if geometry == "crop":
        image = image.resize(resized(image.size, side), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2  # as in coords.window: change both
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (S, S, 3) -> (3, S, S)
    return (pixels - torch.tensor(config.image_mean).view(3, 1, 1)) / torch.tensor(config.image_std).view(3, 1, 1)


def mean_colour(config):
    return tuple(int(255 * m) for m in config.image_mean)  # RGB, 0..255, rounded down as LLaVA's


# ----- the tower, from leaf to root


class Embeddings(nn.Module):
    """Pixels (B, 3, S, S) -> (B, 1 + P, Dv): the class token, then the patches, each with its position."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixel_values):
        # a convolution whose stride is its kernel: one linear layer on every patch
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, P, Dv), row by row
        first = self.class_embedding.expand(len(patches), 1, -1)  # (B, 1, Dv)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 1 + P, Dv)


class Attention(nn.Module):
    """x (B, 1 + P, Dv) -> the same shape. No mask: every token sees every other."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, 1 + P, K)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, 1 + P, Dv)


class MLP(nn.Module):
    """x (B, 1 + P, Dv) -> the same shape."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.is_quick = config.hidden_act == "quick_gelu"  # an approximation that OpenAI's CLIP was trained with

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x))


class Block(nn.Module):
    """A pre-norm transformer block: x (B, 1 + P, Dv) -> the same shape."""

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
        """Normalised images (B, 3, S, S) -> patches (B, P, Dv): HF's hidden_states[-2] without the class token."""
        side = self.config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"images of shape {tuple(pixel_values.shape)}, not (B, 3, {side}, {side}); use preprocess")
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # (B, 1 + P, Dv)
        for block in self.encoder["layers"][:-1]:  # LLaVA reads layer -2
            x = block(x)
        return x[:, 1:]  # (B, P, Dv)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load CLIP's tower from a HF folder, alone or beside other parts, OpenAI's .pt state dict, or open_clip's."""
        if original := original_clip(path):
            stored, values = original
            config = replace(CLIPVisionConfig.from_shapes(stored), **values)
        else:
            config = CLIPVisionConfig.from_dict(read_config(path), read_processor(path))
            stored = sort_tensors(open_tensors(path), path)["vision_tower"]
        return build(lambda: cls(config), stored, path, dtype, device)
