"""The visual LLM: a frozen CLIP ViT sees, an adapter translates, LLaMA speaks (LocVLM, Sec. 3.1).

The whole model is `LocVLM.forward`; read it first. `LocVLM.generate` is the same path with a cache, several questions
behind each image. Images enter as P placeholder ids per image, whose embeddings the adapter's output replaces.

    B images (rows)   T tokens   P patches per image   D LLaMA hidden_size   Dv CLIP hidden_size   V vocabulary   S image side
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import video
from checkpoint import (
    SkipInit,
    build,
    open_tensors,
    read_config,
    read_json,
    sha256,
    sort_tensors,
    write_json,
    write_tensors,
    write_whole,
)
from clip_vit import MEAN, STD, CLIPVisionConfig, CLIPVisionTower, open_image, preprocess
from coords import CoordFormat
from data import IGNORE, IMAGE_ID, SYSTEM, encode_prefix, encode_question
from llama import KVCache, Llama, LlamaConfig, Tokenizer, pack_linears


@dataclass(frozen=True)
class LocVLMConfig:
    """The three parts, and how this model is spoken to."""

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    text_config: LlamaConfig = LlamaConfig()
    adapter: str = "linear"  # "linear" (LocVLM-B, LLaVA v1) or "mlp2x_gelu" (LocVLM-L, LLaVA v1.5)
    geometry: str = "squash"  # see coords.window
    kind: str = "ivb"  # see coords.CoordFormat
    frames: int = 0  # of a clip that it reads at a time; 0: it reads images

    def __post_init__(self):
        if self.adapter not in ("linear", "mlp2x_gelu"):
            raise ValueError(
                f"adapter {self.adapter!r}; expected 'linear' or 'mlp2x_gelu'; LLaVA calls it mm_projector_type"
            )
        self.coord_format()  # refuses a kind or geometry that is none

    @property
    def visual_tokens(self):
        """What an image or a clip is to LLaMA: a token for each patch, after one for each frame (video.pool)."""
        return self.frames + self.vision_config.num_patches

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

        pixel_values  float (images, 3, S, S), normalised by clip_vit.preprocess; or what the tower made of them before, or
                      of clips, (images, P, Dv), see clip_vit.Features
        input_ids     long (B, T), right-padded; P copies of IMAGE_ID per image
        labels        long (B, T), equal to input_ids on the answers and IGNORE elsewhere
        segments, positions  long (B, T), see data.pack
        """
        with torch.no_grad():
            patches = self.vision_tower(pixel_values) if pixel_values.ndim == 4 else pixel_values  # (images, P, Dv)
        visual = self.adapter(patches)  # (images, P, D)
        x = self.language_model.embed_tokens(input_ids.clamp(min=0))  # (B, T, D)
        x = place_image(x, visual, input_ids)
        return answer_loss(self.language_model, x, labels, segments, positions, reduction)

    @torch.inference_mode()
    def generate(self, images, questions, max_new_tokens=64, temperature=0.0, seed=0, on_text=None):
        """Answer k questions about each image: list of lists of str -> list of lists of str.

        images     list of PIL images, paths, or preprocessed (3, S, S) tensors; with config.frames, of clips, see `see`
        questions  a list for each image; the lists may differ in length
        on_text    called with (number of the question over all images, its answer so far) as tokens come
        Each image goes through the tower and LLaMA once; its keys and values serve all its questions. Greedy at
        temperature 0; the paper samples at 0.2.
        """
        if len(images) != len(questions):
            raise ValueError(
                f"{len(images)} images and {len(questions)} lists of questions; expected one list of questions per image"
            )
        llama, tokenizer = self.language_model, self.tokenizer
        rows = [image for image, asked in enumerate(questions) for _ in asked]
        if not rows:
            return [[] for _ in questions]
        device = llama.embed_tokens.weight.device
        visual = self.adapter(self.see(images))  # (images, P, D)

        prefix = encode_prefix(tokenizer, "v1", visual.shape[1])
        input_ids = torch.tensor([prefix] * len(images), device=device)
        x = place_image(llama.embed_tokens(input_ids.clamp(min=0)), visual, input_ids)
        cache = KVCache(llama.config, len(images), len(prefix), device, x.dtype)
        llama.hidden(x, cache=cache)  # the prefix, once; below, each question continues a copy

        prompts = [encode_question(tokenizer, question) for asked in questions for question in asked]
        cache = cache.spread(rows, len(prefix) + max(map(len, prompts)) + max_new_tokens)

        def on_token(row, ids):
            on_text(row, tokenizer.decode(ids).strip())

        sampling = (max_new_tokens, tokenizer.eos_token_id, temperature, seed)
        answers = llama.generate(prompts, *sampling, prefix=cache, on_token=on_text and on_token)
        answers = iter(tokenizer.decode(ids).strip() for ids in answers)
        return [[next(answers) for _ in asked] for asked in questions]

    def for_inference(self, compile=False):
        """Make generation fast, for good: see Llama.for_inference. The tower's linear layers change their layout too."""
        pack_linears(self.vision_tower)
        self.language_model.for_inference(compile)
        return self

    def see(self, images):
        """Run the tower: images -> (images, P, Dv); or clips -> (clips, frames + P, Dv), a token of a frame before those of a place.

        A clip is a path that video.read_frames takes, a list of PIL frames, or one still PIL image.
        """
        fmt, weight = self.config.coord_format(), self.adapter.linear_1.weight
        if self.config.frames:
            clips = [video.frames_of(clip, self.config.frames) for clip in images]
            return torch.stack(
                [video.encode(self.vision_tower, frames, fmt.side, fmt.geometry) for frames in clips]
            ).to(weight)
        pixels = [
            image
            if torch.is_tensor(image)
            else preprocess(image if hasattr(image, "resize") else open_image(image), fmt.side, fmt.geometry)
            for image in images
        ]
        return self.vision_tower(torch.stack(pixels).to(weight))

    # ----- on disk

    @classmethod
    def from_parts(
        cls, vision, llm, adapter="linear", geometry="squash", kind="ivb", frames=0, dtype=torch.float32, device="cpu"
    ):
        """Put together a pretrained tower and a pretrained LLaMA, by their paths.

        adapter  "linear" or "mlp2x_gelu" starts from random weights; a path is read: LLaVA's mm_projector.bin, a run
        """
        tower = CLIPVisionTower.from_pretrained(vision, dtype, device)
        llama = Llama.from_pretrained(llm, dtype, device)
        if adapter in ("linear", "mlp2x_gelu"):
            made = Adapter(adapter, tower.config.hidden_size, llama.config.hidden_size).to(device, dtype)
        else:
            stored = sort_tensors(open_tensors(adapter), adapter)
            made = load_adapter(stored["adapter"], tower, llama, adapter, dtype, device)
        return cls.join(tower, made, llama, Tokenizer(llm), geometry=geometry, kind=kind, frames=frames)

    @classmethod
    def join(cls, tower, adapter, llama, tokenizer, **config):
        """Make a model of three parts that exist already."""
        kind = "linear" if adapter.linear_2 is None else "mlp2x_gelu"
        with torch.device("meta"), SkipInit():
            model = cls(LocVLMConfig(tower.config, llama.config, kind, **config))
        model.vision_tower = tower.requires_grad_(False)
        model.adapter = adapter
        model.language_model = llama
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_pretrained(cls, folder, vision=None, dtype=torch.float32, device="cpu"):
        """Load a run of ours, a llava-hf folder or an original LLaVA, in any of their namings.

        vision  where an original LLaVA does not hold its tower: the CLIP folder that its config names
        What the folder does not say of geometry and coordinates is LLaVA's: its way with images, integers in bins. A run
        of ours refuses a tokenizer that is not the one its weights were trained with.
        """
        folder = Path(folder)
        config, parts = read_config(folder), sort_tensors(open_tensors(folder), folder)
        ours = config.get("locvlm", {})
        for key, expected in FEATURES.items():
            linear = key == "projector_hidden_act" and ours.get("adapter") == "linear"  # see save_pretrained
            if config.get(key, expected[0]) not in expected and not linear:
                raise ValueError(
                    f"{folder}/config.json: {key} = {config[key]!r}; expected {expected[0]!r}, what the adapter reads here; "
                    "use another checkpoint"
                )
        if parts["vision_tower"]:
            shape = (
                CLIPVisionConfig.from_dict(config)
                if "vision_config" in config
                else CLIPVisionConfig.from_shapes(parts["vision_tower"])
            )
            source = f"{folder} (vision tower)"
            tower = build(lambda: CLIPVisionTower(shape), parts["vision_tower"], source, dtype, device)
        elif vision:
            tower = CLIPVisionTower.from_pretrained(vision, dtype, device)
        else:
            raise ValueError(
                f"{folder} holds no vision tower; expected one, or the folder of {config.get('mm_vision_tower', 'a CLIP')}; "
                "give it as --vision"
            )
        language = parts["language_model"]
        if "vocab_size" in ours:  # rows that were added for <image> when it was saved
            for name in {"embed_tokens.weight", "lm_head.weight"} & language.keys():
                language[name] = language[name].rows(0, ours["vocab_size"])
        source = f"{folder} (LLaMA)"
        llama = Llama.from_stored(LlamaConfig.from_dict(config), language, source, dtype, device)
        if ours.get("adapter") == "linear":
            parts["adapter"] = {k: v for k, v in parts["adapter"].items() if not k.startswith("linear_2.")}
        adapter = load_adapter(parts["adapter"], tower, llama, f"{folder} (adapter)", dtype, device)
        tokenizer = Tokenizer(folder)
        if ours and sha256(tokenizer.path) != ours["tokenizer_sha256"]:
            raise ValueError(
                f"{tokenizer.path} is not the tokenizer of these weights (sha256 {sha256(tokenizer.path)[:12]}, expected "
                f"{ours['tokenizer_sha256'][:12]}); its ids mean other words; put the right file there"
            )
        geometry = ours.get("geometry") or foreign_geometry(folder, config)
        how = {"geometry": geometry, "kind": ours.get("kind", "ivb"), "frames": ours.get("frames", 0)}
        return cls.join(tower, adapter, llama, tokenizer, **how)

    def save_pretrained(self, folder, state_dict=None, **notes):
        """Write a llava-hf folder: weights, config, tokenizer, image processor, chat template. `transformers` opens it.

        state_dict  the weights where this model does not hold them whole (fsdp)
        notes  go into config.json's "locvlm", which others ignore, beside what from_pretrained reads there
        LLaVA-hf has a word for the image and an adapter of two layers, so vocabulary rows are added for <image> (the mean
        of the others: never the most likely), and a linear adapter gets the identity as second layer, with no activation
        between: the same function.
        """
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in (state_dict or self.state_dict()).items():
            if name == "language_model.lm_head.weight" and c.text_config.tie_word_embeddings:
                continue
            ours = next(part for part in PARTS if name.startswith(part))
            tensors[PARTS[ours] + name.removeprefix(ours)] = tensor
        # <image> takes the first id that is no piece of the tokenizer; rows are padded to a multiple of 64, as llava-hf's
        image_id, vocab_size = len(self.tokenizer), c.text_config.vocab_size
        rows = vocab_size if image_id < vocab_size else 64 * math.ceil((image_id + 1) / 64)
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if name in tensors and rows > vocab_size:
                mean = tensors[name].float().mean(0, keepdim=True).to(tensors[name].dtype)
                tensors[name] = torch.cat([tensors[name], mean.expand(rows - vocab_size, -1)])
        if c.adapter == "linear":
            width, like = c.text_config.hidden_size, tensors["multi_modal_projector.linear_1.weight"]
            tensors["multi_modal_projector.linear_2.weight"] = torch.eye(width).to(like)
            tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(width).to(like)
        write_tensors(folder / "model.safetensors", tensors)
        tokenizer_model = self.tokenizer.path.read_bytes()
        write_whole(folder / "tokenizer.model", lambda temporary: temporary.write_bytes(tokenizer_model))
        write_whole(folder / "chat_template.jinja", lambda temporary: temporary.write_text(CHAT_TEMPLATE))
        ours = {
            "adapter": c.adapter,
            "geometry": c.geometry,
            "kind": c.kind,
            "frames": c.frames,
            "n_bins": c.coord_format().n_bins,
            "template": "v1",
            "vocab_size": vocab_size,
            "tokenizer_sha256": sha256(self.tokenizer.path),
        }
        files = hf_files(self, image_id, rows)
        files["config.json"]["locvlm"] = {**ours, **notes}
        for name, content in files.items():
            write_json(folder / name, content)


# What a LLaVA's config may say of the features that its adapter reads, and what we read: the first is the default
FEATURES = {
    "mm_vision_select_layer": (-2,),
    "mm_vision_select_feature": ("patch",),
    "vision_feature_layer": (-2,),
    "vision_feature_select_strategy": ("default",),
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_use_im_start_end": (False,),
    "projector_hidden_act": ("gelu",),
}


def load_adapter(stored, tower, llama, source, dtype, device):
    """Build the adapter that the tensors are of."""
    kind = "mlp2x_gelu" if "linear_2.weight" in stored else "linear"
    sizes = tower.config.hidden_size, llama.config.hidden_size
    return build(lambda: Adapter(kind, *sizes), stored, source, dtype, device)


def foreign_geometry(folder, config):
    """How a LLaVA that is not ours brings images to its square: its image_aspect_ratio, or its image processor's words."""
    path = folder / "preprocessor_config.json"
    if "vision_config" in config and path.is_file():
        processor = read_json(path)
        if processor.get("do_pad"):
            return "pad"
        size = processor.get("size")
        whole = not processor.get("do_center_crop", True) and isinstance(size, dict) and "height" in size
        return "squash" if whole else "crop"
    ratio = config.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad"):
        raise ValueError(
            f"{folder}/config.json: image_aspect_ratio = {ratio!r}; expected 'square' or 'pad': this model looks once at the "
            "whole image; use another checkpoint"
        )
    return "pad" if ratio == "pad" else "crop"


def hf_files(model, image_id, vocab_size):
    """The JSON files of a llava-hf folder: file name -> content."""
    c, tokenizer = model.config, model.tokenizer
    side, patch = c.vision_config.image_size, c.vision_config.patch_size
    whole = {"height": side, "width": side}
    processor = {
        "image_processor_type": "LlavaImageProcessor" if c.geometry == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if c.geometry == "crop" else whole,
        "resample": 3,  # bicubic
        "do_center_crop": c.geometry == "crop",
        "crop_size": whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    if c.geometry == "pad":
        processor |= {"do_pad": True, "background_color": [int(255 * m) for m in MEAN]}
    llava_processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "image_token": "<image>",
    }
    pieces = tokenizer.pieces
    special = {
        i: {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, content in (
            (pieces.unk_id(), pieces.id_to_piece(pieces.unk_id())),
            (tokenizer.bos_token_id, pieces.id_to_piece(tokenizer.bos_token_id)),
            (tokenizer.eos_token_id, pieces.id_to_piece(tokenizer.eos_token_id)),
            (image_id, "<image>"),
        )
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": special[pieces.unk_id()]["content"],
        "bos_token": special[tokenizer.bos_token_id]["content"],
        "eos_token": special[tokenizer.eos_token_id]["content"],
        "pad_token": special[pieces.unk_id()]["content"],
        "padding_side": "left",
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "processor_class": "LlavaProcessor",
        "model_max_length": c.text_config.max_position_embeddings,
    }
    text = {k: v for k, v in asdict(c.text_config).items() if k not in ("rope_scaling", "vocab_size")}
    if c.text_config.rope_scaling:
        text["rope_scaling"] = c.text_config.rope_scaling
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {
        "preprocessor_config.json": {**processor, "processor_class": "LlavaProcessor"},
        "processor_config.json": llava_processor,
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": tokenizer_json(tokenizer, special),
        "generation_config.json": {**tokens, "pad_token_id": pieces.unk_id(), "do_sample": False},
        "config.json": {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": image_id,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "linear" if c.adapter == "linear" else "gelu",
            "tie_word_embeddings": c.text_config.tie_word_embeddings,
            "vision_config": {"model_type": "clip_vision_model", **asdict(c.vision_config)},
            "text_config": {"model_type": "llama", "vocab_size": vocab_size, "hidden_act": "silu", **text, **tokens},
        },
    }


def tokenizer_json(tokenizer, special):
    """The sentencepiece model in the format of HF's tokenizers.

    Merges are not in a sentencepiece file: every pair of pieces that makes a piece is one, the better scored the earlier.
    What follows a special token gets a leading space of its own, as where each chunk is tokenised alone.
    """
    pieces = tokenizer.pieces
    vocab = {pieces.id_to_piece(i): i for i in range(len(tokenizer))}
    merges = sorted(
        (-pieces.get_score(i), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        if not (pieces.is_byte(i) or i in special)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    bos = pieces.id_to_piece(tokenizer.bos_token_id)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "single_word": False, **token} for i, token in special.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [f"{left} {right}" for *_, left, right in merges],
        },
    }


CHAT_TEMPLATE = (  # Vicuna v1 in transformers' words: data.encode_prefix and data.encode_segment, for any number of turns
    SYSTEM
    + " {% for m in messages %}{% if m['role'] == 'user' %}USER: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def describe_parts(model):
    """Say what each part holds: list of (name, parameters, how many are trainable)."""
    return [
        (name, sum(p.numel() for p in part.parameters()), sum(p.numel() for p in part.parameters() if p.requires_grad))
        for name, part in model.named_children()
    ]
