"""The visual LLM: a frozen CLIP ViT sees, an adapter translates, LLaMA speaks (LocVLM, Sec. 3.1).

The whole model is `LocVLM.forward`; read it first. `LocVLM.generate` is the same path with a cache, several questions after
each image; `LocVLM.log_likelihood` scores given answers. An image enters as placeholder ids, one per visual token, whose
embeddings the adapter's output replaces.

    B rows   T tokens   P patches per image   N visual tokens, what the adapter makes of P (of a clip: of frames + P)
    D LLaMA hidden_size   Dv CLIP hidden_size   V vocabulary   S image side   A answer tokens of a batch
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from clip_vit import CLIPVisionConfig, CLIPVisionTower, open_image, preprocess
from coords import CoordFormat
from data import IGNORE, Wording, collate, encode_prefix, encode_question, encode_segment, find_places, pack
from formats.fast_cpu import pack_linears
from formats.llava_hf import read_adapter, read_checkpoint, write_checkpoint
from formats.weights import without_contents
from llama import KVCache, Llama, LlamaConfig, read_tokenizer
from video import encode_clip, frames_of

# ----- adapters: from what the tower sees to what LLaMA reads


class LinearAdapter(nn.Module):
    """Patches (images, P, Dv), of clips (clips, frames + P, Dv), -> a visual token each. LocVLM-B's and LLaVA v1's."""

    def __init__(self, vision_size, text_size):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)

    @staticmethod
    def num_tokens(num_patches, frames):
        """Return how many visual tokens an image or a clip becomes; ValueError for a number that does not fit."""
        return frames + num_patches

    def forward(self, patches):
        return self.linear_1(patches)


class MLPAdapter(LinearAdapter):
    """The same with a hidden layer: LocVLM-L's, and LLaVA v1.5's."""

    def __init__(self, vision_size, text_size):
        super().__init__(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, patches):
        return self.linear_2(F.gelu(self.linear_1(patches)))


ADAPTERS = {"linear": LinearAdapter, "mlp2x_gelu": MLPAdapter}  # LLaVA's names (mm_projector_type)


# ----- configuration


@dataclass(frozen=True)
class LocVLMConfig:
    """The three parts, and the prompt and coordinate settings that the model was trained with."""

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    text_config: LlamaConfig = LlamaConfig()
    adapter: str = "linear"  # a key of ADAPTERS
    geometry: str = "squash"  # see coords.window
    kind: str = "ivb"  # see coords.CoordFormat
    location: str = "box"  # see data.Wording, as the next
    words: str = "name"
    frames: int = 0  # frames per clip; 0: the model reads images

    def __post_init__(self):
        if self.adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {self.adapter!r}; choose one of {tuple(ADAPTERS)}")
        _ = self.visual_tokens, Wording(self.coord_format(), location=self.location, words=self.words)  # raise if invalid

    @property
    def visual_tokens(self):
        """How many placeholder ids an image or a clip takes. A clip is one token per frame, then one per patch (video.pool)."""
        return ADAPTERS[self.adapter].num_tokens(self.vision_config.num_patches, self.frames)

    def coord_format(self):
        return CoordFormat(self.kind, self.vision_config.image_size, self.geometry, self.vision_config.patch_size)


VARIANTS = {  # the paper's two models, one for a GPU of 24 GB (TinyLlama), and one that trains on a laptop (weights in tiny/)
    "tiny": LocVLMConfig(
        CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=112),
        LlamaConfig(
            vocab_size=800, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
            rms_norm_eps=1e-5, max_position_embeddings=1024,
        ),
    ),
    "s": LocVLMConfig(
        CLIPVisionConfig(),
        LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, rms_norm_eps=1e-5,
        ),
        "mlp2x_gelu",
    ),
    "b": LocVLMConfig(CLIPVisionConfig(image_size=224), LlamaConfig(), "linear"),
    "l": LocVLMConfig(
        CLIPVisionConfig(image_size=336), LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096), "mlp2x_gelu"
    ),
}  # fmt: skip


# ----- the model


def place_image(x, visual, places):
    """Put visual tokens (images, N, D), in order, at `places` (see data.find_places) of x (B, T, D); the rest stays."""
    if len(places) != visual.shape[0] * visual.shape[1]:
        what = f"{len(places)} image placeholders but {visual.shape[:2].numel()} visual tokens"
        raise ValueError(f"{what} ({visual.shape[0]} images of {visual.shape[1]}); correct the adapter's num_tokens")
    return x.flatten(0, 1).index_copy(0, places, visual.flatten(0, 1).to(x.dtype)).view_as(x)  # rows end to end, and back


def check_lists(images, lists):
    """Raise ValueError unless there is a list for each image. A text in its place would be read letter by letter."""
    if len(images) != len(lists) or not all(isinstance(of_image, list) for of_image in lists):
        raise ValueError(f"{len(images)} images, and for them {str(lists)[:100]}; pass a list of one list per image")


def packed_mask(segment_of, as_blocks=False):
    """Return who may look at whom in packed rows: segment_of (B, T) -> bool (B, 1, T, T), or FlexAttention's BlockMask.

    A token sees the tokens before it that are in the prefix (segment 0) or in its own segment. Padding is segment -1.
    """

    def sees(row, head, query, key):  # FlexAttention's signature; all heads see alike
        return (key <= query) & ((segment_of[row, key] == 0) | (segment_of[row, key] == segment_of[row, query]))

    rows, length = segment_of.shape
    if as_blocks:  # FlexAttention skips blocks of 128 x 128 in which nothing is seen
        return create_block_mask(sees, rows, None, length, length, device=segment_of.device)
    row, column = (torch.arange(size, device=segment_of.device) for size in (rows, length))
    return sees(row[:, None, None, None], None, column[:, None], column)  # (B, 1, 1, 1), (T, 1), (T,) -> (B, 1, T, T)


def answer_loss(llama, x, targets, positions, segment_of=None, reduction="mean"):
    """Next-token loss over the answer tokens of embedded, packed rows x (B, T, D). See `LocVLM.forward`."""
    mask = None if segment_of is None else packed_mask(segment_of, llama.uses_flex)
    hidden = llama.hidden(x, positions, mask)  # (B, T, D)
    rows, columns, ids = targets
    logits = llama.lm_head(hidden[rows, columns])  # (A, V): about one token in ten meets the vocabulary
    return F.cross_entropy(logits.float(), ids, reduction=reduction)


class LocVLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision_config).requires_grad_(False)
        self.adapter = ADAPTERS[config.adapter](config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Llama(config.text_config)
        self.tokenizer = None  # set by from_parts and from_pretrained; it belongs to the weights

    def forward(self, pixel_values, input_ids, places, positions, targets, segment_of=None, reduction="mean"):
        """Next-token loss over the answer tokens: their mean, their sum, or ("none") that of each.

        pixel_values  float (images, 3, S, S), normalised by clip_vit.preprocess; or features (images, P, Dv) that the tower
                      made earlier, see formats.features
        input_ids     long (B, T), right-padded; one IMAGE_ID per visual token
        places        long (images * N,): where the visual tokens go, in rows laid end to end
        positions     long (B, T), for LLaMA's rotation
        targets       long (3, A): of each answer token its row, the column that predicts it, and its id
        segment_of    long (B, T): 0 in the prefix, 1 and up in questions, -1 in padding; None: one question a row
        """
        with torch.no_grad():  # the tower is frozen
            patches = self.vision_tower(pixel_values) if pixel_values.ndim == 4 else pixel_values  # (images, P, Dv)
        visual = self.adapter(patches)  # (images, N, D)
        x = self.language_model.embed_tokens(input_ids.clamp(min=0))  # (B, T, D); IMAGE_ID is negative: any row, replaced below
        x = place_image(x, visual, places)  # (B, T, D)
        return answer_loss(self.language_model, x, targets, positions, segment_of, reduction)

    @torch.inference_mode()
    def generate(self, images, questions, max_new_tokens=64, temperature=0.0, seed=0, on_text=None, seeded_by=None):
        """Answer k questions about each image: list of lists of str -> list of lists of str.

        images     list of PIL images, paths, or preprocessed (3, S, S) tensors; clips as `encode_images` takes them
        questions  one list per image; their lengths may differ
        on_text    called with (number of the question over all images, its answer so far) as tokens arrive
        seeded_by  what seeds the sampling of each question over all images; by default its text, so that all images draw alike
        The tower and LLaMA read each image once; its keys and values serve all its questions. Greedy at temperature 0; the
        paper samples at 0.2.
        """
        check_lists(images, questions)
        llama, tokenizer = self.language_model, self.tokenizer
        image_of = [image for image, of_image in enumerate(questions) for _ in of_image]  # the image of each question
        if not image_of:
            return [[] for _ in questions]
        device = llama.embed_tokens.weight.device
        visual = self.adapter(self.encode_images(images))  # (images, N, D)

        prefix = encode_prefix(tokenizer, "v1", visual.shape[1])
        input_ids = torch.tensor([prefix] * len(images), device=device)  # (images, T)
        x = place_image(llama.embed_tokens(input_ids.clamp(min=0)), visual, find_places(input_ids))  # (images, T, D)
        cache = KVCache(llama.config, len(images), len(prefix), device, x.dtype)
        llama.hidden(x, cache=cache)  # the prefix, once; below, each question continues a copy of it

        prompts = [encode_question(tokenizer, question) for of_image in questions for question in of_image]
        cache.take_rows(image_of, len(prefix) + max(map(len, prompts)) + max_new_tokens)

        on_token = on_text and (lambda row, ids: on_text(row, tokenizer.decode(ids).strip()))
        sampling = (max_new_tokens, tokenizer.eos_token_id, temperature, seed)
        answers = llama.generate(prompts, *sampling, seeded_by=seeded_by, cache=cache, on_token=on_token)
        answers = iter(tokenizer.decode(ids).strip() for ids in answers)
        return [[next(answers) for _ in of_image] for of_image in questions]

    @torch.inference_mode()
    def log_likelihood(self, images, turns):
        """Score given answers: per image, a list of (question, answer) -> for each, log p of its tokens and of the end token.

        Rows are packed as in training, an image once before all its turns: minus the sum of all is `forward`'s summed loss.
        """
        check_lists(images, turns)
        prefix = encode_prefix(self.tokenizer, "v1", self.config.visual_tokens)
        segments = [[encode_segment(self.tokenizer, "v1", [turn]) for turn in of_image] for of_image in turns]
        longest = len(prefix) + max((len(ids) for of_image in segments for ids, _ in of_image), default=0)
        if longest > (limit := self.config.text_config.max_position_embeddings):
            raise ValueError(f"{longest} tokens exceed max_position_embeddings = {limit}; shorten the question or the answer")
        batch = collate([pack(prefix, of_image, 10**9) for of_image in segments])  # each turn was measured above
        patches = self.encode_images(images)  # (images, P, Dv)
        batch = {key: value.to(patches.device) for key, value in batch.items() if value is not None}
        log_p = iter((-self(patches, **batch, reduction="none")).tolist())  # row by row, in the order of its segments
        return [[[next(log_p) for i in labels if i != IGNORE] for _, labels in of_image] for of_image in segments]

    def encode_images(self, images):
        """Run the tower: images -> (images, P, Dv), or clips -> (clips, frames + P, Dv).

        A clip is a path that video.read_frames takes, a list of PIL frames, or one still PIL image.
        """
        config, like = self.config, next(self.adapter.parameters())
        if config.frames:
            clips = [frames_of(clip, config.frames) for clip in images]
            return torch.stack([encode_clip(self.vision_tower, frames, config.geometry) for frames in clips]).to(like)
        opened = (image if isinstance(image, Image.Image | torch.Tensor) else open_image(image) for image in images)
        pixels = [i if torch.is_tensor(i) else preprocess(i, config.vision_config, config.geometry) for i in opened]
        return self.vision_tower(torch.stack(pixels).to(like))  # (images, 3, S, S) -> (images, P, Dv)

    def for_inference(self, compile=False):
        """Speed up generation irreversibly, see Llama.for_inference. Returns self."""
        pack_linears(self.vision_tower)
        self.language_model.for_inference(compile)
        return self

    # ----- on disk

    @classmethod
    def from_parts(cls, vision, llm, adapter="linear", *, dtype=torch.float32, device="cpu", **settings):
        """Join a pretrained tower and a pretrained LLaMA, by their paths.

        adapter   a key of ADAPTERS starts from random weights; a path is read: LLaVA's mm_projector.bin, or a run
        settings  of LocVLMConfig: geometry, kind, location, words, frames
        """
        tower = CLIPVisionTower.from_pretrained(vision, dtype, device)
        llama = Llama.from_pretrained(llm, dtype, device)
        sizes = tower.config.hidden_size, llama.config.hidden_size
        if adapter in ADAPTERS:
            module = ADAPTERS[adapter](*sizes).to(device, dtype)
        else:
            module = read_adapter(adapter, ADAPTERS, sizes, dtype, device)
        return cls.join(tower, module, llama, read_tokenizer(llm), **settings)

    @classmethod
    def join(cls, tower, adapter, llama, tokenizer, **settings):
        """Make a model from its parts. Raise ValueError if the tokenizer has ids that the LLaMA has no embedding for."""
        if len(tokenizer) > llama.config.vocab_size:
            rows = f"{len(tokenizer)} pieces, more than the {llama.config.vocab_size} rows of the embedding"
            raise ValueError(f"{tokenizer.path} has {rows}; pass the tokenizer that belongs to these weights")
        name = next(name for name, adapter_class in ADAPTERS.items() if adapter_class is type(adapter))
        with without_contents():
            model = cls(LocVLMConfig(tower.config, llama.config, name, **settings))
        model.vision_tower, model.adapter = tower.requires_grad_(False), adapter
        model.language_model, model.tokenizer = llama, tokenizer
        return model

    @classmethod
    def from_pretrained(cls, folder, vision=None, dtype=torch.float32, device="cpu"):
        """Load a run of ours, a llava-hf folder or an original LLaVA, in any of their namings.

        vision  the CLIP folder, for an original LLaVA that lacks its tower
        Settings missing in the folder default to LLaVA's geometry and to IVB. For a run of ours, the tokenizer must be the
        one that its weights were trained with.
        """
        *parts, settings = read_checkpoint(Path(folder), vision, ADAPTERS, dtype, device)
        return cls.join(*parts, **settings)

    def save_pretrained(self, folder, state_dict=None, **notes):
        """Write a llava-hf folder, which `transformers` opens: weights, config, tokenizer, image processor, chat template.

        state_dict  the whole weights, if this model holds only a shard of them (fsdp)
        notes       stored in config.json under "locvlm", beside our settings
        """
        write_checkpoint(self, Path(folder), state_dict, notes)
