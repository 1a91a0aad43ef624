"""The visual LLM: a frozen CLIP ViT sees, an adapter translates, LLaMA speaks (LocVLM, Sec. 3.1).

The whole model is `LocVLM.forward`; read it first. `LocVLM.generate` is the same path with a cache, several questions
behind each image. Images enter as P placeholder ids per image, whose embeddings the adapter's output replaces.

    B images (rows)   T tokens   P patches per image   D LLaMA hidden_size   Dv CLIP hidden_size   V vocabulary   S image side
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from checkpoint import load_strictly, read_config, read_tensors, write_json, write_tensors
from clip_vit import CLIPVisionConfig, CLIPVisionTower, open_image, preprocess, vision_tensors
from coords import CoordFormat
from data import IGNORE, IMAGE_ID, encode_prefix, encode_question
from llama import KVCache, Llama, LlamaConfig, Tokenizer, llama_tensors


@dataclass(frozen=True)
class LocVLMConfig:
    """The three parts, and how this model is spoken to."""

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    text_config: LlamaConfig = LlamaConfig()
    adapter: str = "linear"  # "linear" (LocVLM-B, LLaVA v1) or "mlp2x_gelu" (LocVLM-L, LLaVA v1.5)
    geometry: str = "squash"  # see coords.window
    kind: str = "ivb"  # see coords.CoordFormat

    def __post_init__(self):
        if self.adapter not in ("linear", "mlp2x_gelu"):
            raise ValueError(
                f"adapter {self.adapter!r}; expected 'linear' or 'mlp2x_gelu'; LLaVA calls it mm_projector_type"
            )
        self.coord_format()  # refuses a kind or geometry that is none

    def coord_format(self):
        return CoordFormat(self.kind, self.vision_config.image_size, self.geometry, self.vision_config.patch_size)


PARTS = {
    "vision_tower.": "vision_tower.vision_model.",
    "adapter.": "multi_modal_projector.",
    "language_model.lm_head.": "language_model.lm_head.",
    "language_model.": "language_model.model.",
}  # our names -> llava-hf's, the first that fits

VARIANTS = {  # the paper's two models, and the one that trains on a laptop (shapes of tiny/)
    "tiny": LocVLMConfig(
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=112
        ),
        LlamaConfig(
            vocab_size=800,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            rms_norm_eps=1e-5,
            max_position_embeddings=1024,
        ),
    ),
    "b": LocVLMConfig(CLIPVisionConfig(image_size=224), LlamaConfig(), "linear"),
    "l": LocVLMConfig(
        CLIPVisionConfig(image_size=336), LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096), "mlp2x_gelu"
    ),
}


class Adapter(nn.Module):
    """Patches (B, P, Dv) -> visual tokens (B, P, D). LLaVA calls it the projector."""

    def __init__(self, kind, vision_size, text_size):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size) if kind == "mlp2x_gelu" else None

    def forward(self, patches):
        x = self.linear_1(patches)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


def place_image(x, visual, input_ids):
    """Put visual tokens (images, P, D) where input_ids (B, T) hold IMAGE_ID, in order; x (B, T, D) elsewhere."""
    holes = input_ids == IMAGE_ID
    if holes.sum() != visual.shape[0] * visual.shape[1]:
        raise ValueError(
            f"{int(holes.sum())} image placeholders for {visual.shape[0]} images of {visual.shape[1]} patches; expected as many; "
            "use data.encode_prefix"
        )
    return x.masked_scatter(holes.unsqueeze(-1), visual.to(x.dtype))


def packed_mask(segments):
    """Who may look at whom in packed rows: segments (B, T) -> bool (B, 1, T, T).

    A token sees what comes before it, in the prefix (segment 0) and in its own segment. Padding (-1) sees the prefix
    and padding, and nothing sees padding.
    """
    length = segments.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    shared = segments[:, None, :] == 0
    own = segments[:, :, None] == segments[:, None, :]
    return (before & (shared | own)).unsqueeze(1)


def answer_loss(llama, x, labels, segments, positions, reduction="mean"):
    """Next-token loss over the supervised tokens of embedded, packed rows x (B, T, D)."""
    one = bool((segments <= 1).all())  # nothing to keep apart: plain causal attention, the fastest
    hidden = llama.hidden(x, positions, None if one else packed_mask(segments))
    # A token is predicted from the one before it: the shift is here, and nowhere else. Before a segment's first token
    # stands the prefix, whose last column is that token's position - 1. About one token in ten meets the vocabulary.
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # (N,): answer tokens, at column + 1
    opens = segments[rows, columns + 1] != segments[rows, columns]
    before = torch.where(opens, positions[rows, columns + 1] - 1, columns)
    logits = llama.lm_head(hidden[rows, before])  # (N, V)
    return F.cross_entropy(logits.float(), labels[rows, columns + 1], reduction=reduction)


class LocVLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision_config).requires_grad_(False)
        self.adapter = Adapter(config.adapter, config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Llama(config.text_config)
        self.tokenizer = None  # set by from_parts and from_pretrained; it belongs to the weights

    def forward(self, pixel_values, input_ids, labels, segments, positions, reduction="mean"):
        """Next-token loss over the answer tokens (their mean, or their sum).

        pixel_values  float (images, 3, S, S), normalised by clip_vit.preprocess
        input_ids     long (B, T), right-padded; P copies of IMAGE_ID per image
        labels        long (B, T), equal to input_ids on the answers and IGNORE elsewhere
        segments, positions  long (B, T), see data.pack
        """
        with torch.no_grad():
            patches = self.vision_tower(pixel_values)  # (images, P, Dv)
        visual = self.adapter(patches)  # (images, P, D)
        x = self.language_model.embed_tokens(input_ids.clamp(min=0))  # (B, T, D)
        x = place_image(x, visual, input_ids)
        return answer_loss(self.language_model, x, labels, segments, positions, reduction)

    @torch.inference_mode()
    def generate(self, images, questions, max_new_tokens=64, temperature=0.0, seed=0):
        """Answer k questions about each image: list of lists of str -> list of lists of str.

        images     list of PIL images, paths, or preprocessed (3, S, S) tensors
        questions  a list for each image; the lists may differ in length
        Each image goes through the tower and LLaMA once; its keys and values serve all its questions. Greedy at
        temperature 0; the paper samples at 0.2.
        """
        if len(images) != len(questions):
            raise ValueError(
                f"{len(images)} images and {len(questions)} lists of questions; expected one list of questions per image"
            )
        llama, tokenizer, fmt = self.language_model, self.tokenizer, self.config.coord_format()
        rows = [image for image, asked in enumerate(questions) for _ in asked]
        if not rows:
            return [[] for _ in questions]
        device = llama.embed_tokens.weight.device
        images = [
            image
            if torch.is_tensor(image)
            else preprocess(image if hasattr(image, "resize") else open_image(image), fmt.side, fmt.geometry)
            for image in images
        ]
        visual = self.adapter(self.vision_tower(torch.stack(images).to(device, self.adapter.linear_1.weight.dtype)))

        prefix = encode_prefix(tokenizer, "v1", visual.shape[1])
        input_ids = torch.tensor([prefix] * len(images), device=device)
        x = place_image(llama.embed_tokens(input_ids.clamp(min=0)), visual, input_ids)
        cache = KVCache(llama.config, len(images), len(prefix), device, x.dtype)
        llama.hidden(x, cache=cache)

        prompts = [encode_question(tokenizer, question) for asked in questions for question in asked]
        cache = cache.spread(llama.config, rows, len(prefix) + max(map(len, prompts)) + max_new_tokens)
        answers = llama.generate(prompts, max_new_tokens, tokenizer.eos_token_id, temperature, seed, prefix=cache)
        answers = iter(tokenizer.decode(ids).strip() for ids in answers)
        return [[next(answers) for _ in asked] for asked in questions]

    # ----- on disk

    @classmethod
    def from_parts(cls, vision, llm, adapter="linear", geometry="squash", kind="ivb"):
        """Put together a pretrained tower and a pretrained LLaMA (HF folders); the adapter starts from random weights."""
        tower, llama = CLIPVisionTower.from_pretrained(vision), Llama.from_pretrained(llm)
        model = cls(LocVLMConfig(tower.config, llama.config, adapter, geometry, kind))
        model.vision_tower = tower.requires_grad_(False)
        model.language_model = llama
        model.tokenizer = Tokenizer(llm)
        return model

    def save_pretrained(self, folder):
        """Write a checkpoint folder in the layout of llava-hf (config.json, model.safetensors, tokenizer.model)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name == "language_model.lm_head.weight" and self.config.text_config.tie_word_embeddings:
                continue
            ours = next(part for part in PARTS if name.startswith(part))
            tensors[PARTS[ours] + name.removeprefix(ours)] = tensor
        write_tensors(folder / "model.safetensors", tensors)
        shutil.copyfile(self.tokenizer.path, folder / "tokenizer.model.tmp")
        (folder / "tokenizer.model.tmp").replace(folder / "tokenizer.model")
        c = self.config
        write_json(
            folder / "config.json",
            {
                "model_type": "llava",
                "architectures": ["LlavaForConditionalGeneration"],
                "image_token_index": IMAGE_ID,
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "projector_hidden_act": "gelu",
                "vision_config": {"model_type": "clip_vision_model", **asdict(c.vision_config)},
                "text_config": {"model_type": "llama", **asdict(c.text_config)},
                "locvlm": {
                    "adapter": c.adapter,
                    "geometry": c.geometry,
                    "kind": c.kind,
                    "tokenizer_sha256": sha256(self.tokenizer.path),
                },
            },
        )

    @classmethod
    def from_pretrained(cls, folder):
        """Load what save_pretrained wrote. Refuses a tokenizer that is not the one the weights were trained with."""
        config, tensors = read_config(folder), read_tensors(folder)
        if "locvlm" not in config:
            raise ValueError(
                f"{folder}/config.json has no 'locvlm' part; expected a checkpoint that this project saved; to build one from a "
                "CLIP and a LLaMA folder use train.py --vision and --llm"
            )
        ours = {key: config["locvlm"][key] for key in ("adapter", "geometry", "kind")}
        tokenizer_sha256 = config["locvlm"]["tokenizer_sha256"]
        model = cls(LocVLMConfig(CLIPVisionConfig.from_dict(config), LlamaConfig.from_dict(config), **ours))
        parts = {"vision_tower.": {}, "multi_modal_projector.": {}, "language_model.": {}}
        for name, tensor in tensors.items():
            part = next((p for p in parts if name.startswith(p)), None)
            if part is None:
                raise ValueError(
                    f"{folder}: tensor {name} belongs to no part; expected {', '.join(parts)}; is this another model's file?"
                )
            parts[part][name.removeprefix(part)] = tensor
        load_strictly(model.vision_tower, vision_tensors(parts["vision_tower."]), f"{folder} (vision tower)")
        load_strictly(model.adapter, parts["multi_modal_projector."], f"{folder} (adapter)")
        load_strictly(
            model.language_model, llama_tensors(parts["language_model."], model.config.text_config), f"{folder} (LLaMA)"
        )
        model.tokenizer = Tokenizer(folder)
        if sha256(model.tokenizer.path) != tokenizer_sha256:
            raise ValueError(
                f"{model.tokenizer.path} is not the tokenizer of these weights (sha256 {sha256(model.tokenizer.path)[:12]}, expected "
                f"{tokenizer_sha256[:12]}); its ids mean other words; put the right file there"
            )
        return model


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe_parts(model):
    """Say what each part holds: list of (name, parameters, how many are trainable)."""
    return [
        (name, sum(p.numel() for p in part.parameters()), sum(p.numel() for p in part.parameters() if p.requires_grad))
        for name, part in model.named_children()
    ]
