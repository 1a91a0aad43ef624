"""Checkpoints of whole models: read a run of ours, llava-hf's or LLaVA's own; write llava-hf's.

LLaVA-hf has a word for the image and an adapter of two layers. So a saved folder has added vocabulary rows for <image> (the
mean of the others: never the most likely), and a linear adapter the identity as its second layer, without activation before it.
`read_checkpoint` undoes both. Our settings are in config.json's "locvlm", which others ignore.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from clip_vit import CLIPVisionConfig, CLIPVisionTower, mean_colour
from data import ASSISTANT, SYSTEM, USER
from formats.files import read_config, read_json, sha256, write_json, write_text, write_whole
from formats.weights import build, open_tensors, sort_tensors, write_tensors
from llama import Llama, LlamaConfig, read_tokenizer

PARTS = {  # our names -> llava-hf's; the first prefix that fits
    "vision_tower.": "vision_tower.vision_model.", "adapter.": "multi_modal_projector.",
    "language_model.lm_head.": "language_model.lm_head.", "language_model.": "language_model.model.",
}
SUPPORTED = {  # keys of a LLaVA's config, and the values that this model can read; the first is the default
    "mm_vision_select_layer": (-2,), "mm_vision_select_feature": ("patch",),
    "vision_feature_layer": (-2,), "vision_feature_select_strategy": ("default",),
    "mm_projector_type": ("linear", "mlp2x_gelu"), "projector_hidden_act": ("gelu",), "mm_use_im_start_end": (False,),
}
SETTINGS = ("geometry", "kind", "location", "words", "frames")  # of LocVLMConfig, saved under "locvlm"
CHAT_TEMPLATE = (  # data.encode_prefix and data.encode_segment as transformers' template, for any number of turns
    SYSTEM + " {% for m in messages %}{% if m['role'] == 'user' %}"
    + USER + " {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% else %}"
    + ASSISTANT + " {% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def read_checkpoint(folder, vision, adapters, dtype, device):
    """Read a whole model: (tower, adapter, LLaMA, tokenizer, settings of LocVLMConfig). See LocVLM.from_pretrained."""
    config, parts = read_config(folder), sort_tensors(open_tensors(folder), folder)
    ours, stored, language = config.get("locvlm", {}), parts["adapter"], parts["language_model"]
    for key, values in SUPPORTED.items():
        is_our_identity = key == "projector_hidden_act" and ours.get("adapter") == "linear"
        if config.get(key, values[0]) not in values and not is_our_identity:
            raise ValueError(f"{folder}/config.json: unsupported {key} = {config[key]!r}, expected {values[0]!r}")
    tower = read_tower(folder, config, parts["vision_tower"], vision, dtype, device)
    if "vocab_size" in ours:  # drop the rows added for <image>
        for name in {"embed_tokens.weight", "lm_head.weight"} & language.keys():
            language[name] = language[name].rows(0, ours["vocab_size"])
    llama = Llama.from_stored(LlamaConfig.from_dict(config), language, f"{folder} (LLaMA)", dtype, device)
    sizes = tower.config.hidden_size, llama.config.hidden_size
    adapter = build_adapter(stored, ours, adapters, sizes, f"{folder} (adapter)", dtype, device)
    tokenizer = read_tokenizer(folder)
    if ours and sha256(tokenizer.path) != ours["tokenizer_sha256"]:
        hint = f"use the one whose sha256 begins {ours['tokenizer_sha256'][:12]}"
        raise ValueError(f"{tokenizer.path} is not the tokenizer that these weights were trained with; {hint}")
    settings = {key: ours[key] for key in SETTINGS if key in ours}
    return tower, adapter, llama, tokenizer, {"geometry": ours.get("geometry") or geometry_of(folder, config), **settings}


def read_tower(folder, config, stored, vision, dtype, device):
    """Read the tower inside a checkpoint, or the one at `vision`."""
    if stored:
        shape = CLIPVisionConfig.from_dict(config) if "vision_config" in config else CLIPVisionConfig.from_shapes(stored)
        return build(lambda: CLIPVisionTower(shape), stored, f"{folder} (vision tower)", dtype, device)
    if not vision:
        clip = config.get("mm_vision_tower", "its CLIP")
        raise ValueError(f"{folder} holds no vision tower; pass the folder of {clip} as --vision")
    return CLIPVisionTower.from_pretrained(vision, dtype, device)


def read_adapter(path, adapters, sizes, dtype=torch.float32, device="cpu"):
    """Read an adapter alone: LLaVA's mm_projector.bin, or the one inside a run. sizes: of CLIP and LLaMA."""
    ours = read_json(Path(path) / "config.json").get("locvlm", {}) if (Path(path) / "config.json").is_file() else {}
    return build_adapter(sort_tensors(open_tensors(path), path)["adapter"], ours, adapters, sizes, path, dtype, device)


def build_adapter(stored, ours, adapters, sizes, source, dtype, device):
    """Make the adapter that a run of ours names under "locvlm", or that a LLaVA's tensors show."""
    kind = ours.get("adapter") or ("mlp2x_gelu" if "linear_2.weight" in stored else "linear")
    if kind == "linear":  # drop the identity
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("linear_2.")}
    return build(lambda: adapters[kind](*sizes), stored, source, dtype, device)


def geometry_of(folder, config):
    """Return how a LLaVA that is not ours makes its square: from its image processor, or its image_aspect_ratio."""
    if "vision_config" in config:  # llava-hf's; transformers 5 writes the image processor into the processor's file
        paths = [folder / "preprocessor_config.json", folder / "processor_config.json"]
        found = [read_json(path) for path in paths if path.is_file()]
        found = [content.get("image_processor", content) for content in found]
        processor = next((content for content in found if content.keys() & {"size", "do_resize"}), None)
        if not processor:
            print(f"{folder} has no preprocessor_config.json: images are cropped to a square, as CLIP does")
            return "crop"
        if processor.get("do_pad"):
            return "pad"
        size, is_crop = processor.get("size"), processor.get("do_center_crop", True)
        return "squash" if not is_crop and isinstance(size, dict) and "height" in size else "crop"
    ratios = {"square": "crop", "pad": "pad"}
    if (ratio := config.get("image_aspect_ratio") or "square") not in ratios:
        hint = "this model looks once at the whole image ('square' or 'pad')"
        raise ValueError(f"{folder}/config.json: unsupported image_aspect_ratio = {ratio!r}; {hint}")
    return ratios[ratio]


def write_checkpoint(model, folder, state_dict, notes):
    """Write a llava-hf folder, see LocVLM.save_pretrained."""
    config, tokenizer = model.config, model.tokenizer
    # <image> takes the first id that is no piece of the tokenizer; rows are padded to a multiple of 64, as llava-hf's
    image_id, vocab_size = len(tokenizer), config.text_config.vocab_size
    rows = vocab_size if image_id < vocab_size else 64 * math.ceil((image_id + 1) / 64)
    write_tensors(folder / "model.safetensors", llava_tensors(model, state_dict or model.state_dict(), rows))
    tokenizer_model = tokenizer.path.read_bytes()
    write_whole(folder / tokenizer.path.name, lambda temporary: temporary.write_bytes(tokenizer_model))
    write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)
    ours = {
        "adapter": config.adapter, **{key: getattr(config, key) for key in SETTINGS}, "n_bins": config.coord_format().n_bins,
        "template": "v1", "vocab_size": vocab_size, "tokenizer_sha256": sha256(tokenizer.path),
    }
    files = processor_files(config) | tokenizer_files(config, tokenizer, image_id)
    files["config.json"] = {**llava_config(config, tokenizer, image_id, rows), "locvlm": {**ours, **notes}}
    for name, content in files.items():
        write_json(folder / name, content)


def llava_tensors(model, state_dict, rows):
    """Return the weights under llava-hf's names, with `rows` rows of vocabulary and an adapter of two layers."""
    config, tensors = model.config, {}
    for name, tensor in state_dict.items():
        if name == "language_model.lm_head.weight" and config.text_config.tie_word_embeddings:
            continue
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        tensors[PARTS[prefix] + name.removeprefix(prefix)] = tensor
    added = rows - config.text_config.vocab_size
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors and added > 0:
            mean = tensors[name].float().mean(0, keepdim=True).to(tensors[name].dtype)  # (1, D)
            tensors[name] = torch.cat([tensors[name], mean.expand(added, -1)])
    if config.adapter == "linear":
        width, like = config.text_config.hidden_size, tensors["multi_modal_projector.linear_1.weight"]
        tensors["multi_modal_projector.linear_2.weight"] = torch.eye(width).to(like)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(width).to(like)
    return tensors


def processor_files(config):
    """Return the JSON files of the image processor: {file name: content}."""
    vision, side = config.vision_config, config.vision_config.image_size
    is_pad, is_crop = config.geometry == "pad", config.geometry == "crop"
    whole = {"height": side, "width": side}
    processor = {
        "image_processor_type": "LlavaImageProcessor" if is_pad else "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": side} if is_crop else whole, "resample": 3,  # bicubic
        "do_center_crop": is_crop, "crop_size": whole, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": vision.image_mean, "image_std": vision.image_std,
        "processor_class": "LlavaProcessor",
    } | ({"do_pad": True, "background_color": list(mean_colour(vision))} if is_pad else {})
    llava = {  # the additional token is the class token, which "default" drops again
        "processor_class": "LlavaProcessor", "patch_size": vision.patch_size, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>",
    }
    return {"preprocessor_config.json": processor, "processor_config.json": llava}


def llava_config(config, tokenizer, image_id, vocab_size):
    """Return the content of config.json, but for our own settings."""
    moved = ("image_mean", "image_std")  # to the image processor, in llava-hf
    vision = {key: value for key, value in asdict(config.vision_config).items() if key not in moved}
    text = {key: value for key, value in asdict(config.text_config).items() if value or key != "rope_scaling"}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": image_id,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "linear" if config.adapter == "linear" else "gelu",
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "llama", "hidden_act": "silu", **text, "vocab_size": vocab_size, **tokens},
    }


def tokenizer_files(config, tokenizer, image_id):
    """Return the JSON files of a sentencepiece tokenizer: {file name: content}. Another one's file is saved as it is."""
    if not hasattr(tokenizer, "piece"):
        return {}
    ids = {"unk": tokenizer.unk_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    unk, bos, eos = (tokenizer.piece(i) for i in ids.values())
    how = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    contents = {ids["unk"]: unk, ids["bos"]: bos, ids["eos"]: eos, image_id: "<image>"}
    special = {i: {"content": content, **how} for i, content in contents.items()}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": unk, "padding_side": "left",
            "added_tokens_decoder": {str(i): token for i, token in special.items()},
            "processor_class": "LlavaProcessor", "model_max_length": config.text_config.max_position_embeddings,
        },
        "generation_config.json": {
            "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["unk"], "do_sample": False,
        },
        "tokenizer.json": tokenizer_json(tokenizer, special),
    }


def tokenizer_json(tokenizer, special):
    """Return a sentencepiece model in the format of HF's tokenizers.

    Its merges: every pair of pieces that makes a piece, the best score first. The text after a special token gets a space.
    """
    vocab = {tokenizer.piece(i): i for i in range(len(tokenizer))}
    merges = sorted(
        (-tokenizer.score(i), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        if not (tokenizer.is_byte(i) or i in special)
        for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
    )
    bos = tokenizer.piece(tokenizer.bos_token_id)
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return read_json(Path(__file__).with_name("tokenizer.json")) | {
        "added_tokens": [{"id": i, "single_word": False, **token} for i, token in special.items()],
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
        },
        "model": {
            "type": "BPE", "unk_token": tokenizer.piece(tokenizer.unk_token_id), "fuse_unk": True, "byte_fallback": True,
            "vocab": vocab, "merges": [f"{left} {right}" for *_, left, right in merges],
        },
    }
