"""Checkpoints of whole models: read a run of ours, llava-hf's or LLaVA's own; write llava-hf's.

LLaVA-hf has a word for the image and an adapter of two layers. So a saved folder has added vocabulary rows for <image> (the
mean of the others: never the most likely), and a linear adapter the identity as its second layer, without activation before it.
`read_checkpoint` undoes both. Our settings are in config.json's "locvlm", which others ignore.
"""

import math
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from string import Template

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


def read_checkpoint(folder, vision, adapters, dtype, device):
    """Read a whole model: (tower, adapter, LLaMA, tokenizer, settings of LocVLMConfig). See LocVLM.from_pretrained."""
    config, parts = read_config(folder), sort_tensors(open_tensors(folder), folder)
    ours, language = config.get("locvlm", {}), parts["language_model"]
    for key, values in SUPPORTED.items():
        is_our_identity = key == "projector_hidden_act" and ours.get("adapter") == "linear"
        if config.get(key, values[0]) not in values and not is_our_identity:
            raise ValueError(f"{folder}/config.json: unsupported {key} = {config[key]!r}, expected {values[0]!r}")
    tower = read_tower(folder, config, parts["vision_tower"], vision, dtype, device)
    if "vocab_size" in ours:  # drop the rows added for <image>
        for name in {"embed_tokens.weight", "lm_head.weight"} & language.keys():
            language[name] = language[name].rows(0, ours["vocab_size"])
    llama = Llama.from_stored(LlamaConfig.from_dict(config), language, f"{folder} (LLaMA)", dtype, device)
    adapter = read_adapter(folder, adapters, (tower.config.hidden_size, llama.config.hidden_size), dtype, device)
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
    """Read the adapter alone: of a run, which names its kind, of a LLaVA, or its mm_projector.bin. sizes: of CLIP and LLaMA."""
    stored, config = sort_tensors(open_tensors(path), path)["adapter"], Path(path) / "config.json"
    ours = read_json(config).get("locvlm", {}) if config.is_file() else {}
    kind = ours.get("adapter") or ("mlp2x_gelu" if "linear_2.weight" in stored else "linear")
    if kind == "linear":  # drop the identity
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("linear_2.")}
    return build(lambda: adapters[kind](*sizes), stored, f"{path} (adapter)", dtype, device)


def geometry_of(folder, config):
    """Return how a LLaVA that is not ours makes its square: from its image_aspect_ratio, or llava-hf's image processor."""
    if "vision_config" not in config:
        ratio = config.get("image_aspect_ratio") or "square"
        if ratio not in ("square", "pad"):
            hint = "this model looks once at the whole image ('square' or 'pad')"
            raise ValueError(f"{folder}/config.json: unsupported image_aspect_ratio = {ratio!r}; {hint}")
        return "pad" if ratio == "pad" else "crop"
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):  # transformers 5 has it in the second
        content = read_json(path) if path.is_file() else {}
        processor = content.get("image_processor", content)
        if processor.get("do_pad"):
            return "pad"
        if processor.keys() & {"size", "do_resize"}:
            size, is_crop = processor.get("size"), processor.get("do_center_crop", True)
            return "squash" if not is_crop and isinstance(size, dict) and "height" in size else "crop"
    print(f"{folder} has no preprocessor_config.json: images are cropped to a square, as CLIP does")
    return "crop"


def template(name):
    """Read the constant content of one of llava-hf's files; null stands for what is filled in here."""
    return read_json(Path(__file__).with_name("llava_hf.json"))[name]


def write_checkpoint(model, folder, state_dict, notes):
    """Write a llava-hf folder, see LocVLM.save_pretrained."""
    config, tokenizer = model.config, model.tokenizer
    # <image> takes the first id that is no piece of the tokenizer; rows are padded to a multiple of 64, as llava-hf's
    image_id, vocab_size = len(tokenizer), config.text_config.vocab_size
    rows = vocab_size if image_id < vocab_size else 64 * math.ceil((image_id + 1) / 64)
    write_tensors(folder / "model.safetensors", llava_tensors(model, state_dict or model.state_dict(), rows))
    write_whole(folder / tokenizer.path.name, partial(shutil.copyfile, tokenizer.path))
    chat = Template("".join(template("chat_template.jinja")))  # data.encode_prefix and encode_segment, for any number of turns
    write_text(folder / "chat_template.jinja", chat.substitute(SYSTEM=SYSTEM, USER=USER, ASSISTANT=ASSISTANT))
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
    vision, side, is_crop = config.vision_config, config.vision_config.image_size, config.geometry == "crop"
    square = {"height": side, "width": side}
    processor = template("preprocessor_config.json") | {
        "size": {"shortest_edge": side} if is_crop else square, "do_center_crop": is_crop, "crop_size": square,
        "image_mean": vision.image_mean, "image_std": vision.image_std,
    }
    if config.geometry == "pad":
        colour = list(mean_colour(vision))
        processor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "background_color": colour}
    llava = template("processor_config.json") | {"patch_size": vision.patch_size}
    return {"preprocessor_config.json": processor, "processor_config.json": llava}


def llava_config(config, tokenizer, image_id, vocab_size):
    """Return the content of config.json, but for our own settings."""
    content = template("config.json") | {
        "image_token_index": image_id, "projector_hidden_act": "linear" if config.adapter == "linear" else "gelu",
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }
    vision, text = asdict(config.vision_config), asdict(config.text_config)
    del vision["image_mean"], vision["image_std"]  # llava-hf has them in the image processor
    content["vision_config"] |= vision
    content["text_config"] |= {key: value for key, value in text.items() if value or key != "rope_scaling"}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    content["text_config"] |= {"vocab_size": vocab_size, **tokens}
    return content


def tokenizer_files(config, tokenizer, image_id):
    """Return the JSON files of a sentencepiece tokenizer: {file name: content}. Another one's file is saved as it is."""
    if not hasattr(tokenizer, "piece"):
        return {}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos")} | {"pad": tokenizer.unk_token_id}
    pieces = {name: tokenizer.piece(i) for name, i in ids.items()}
    how = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {ids[name]: {"content": pieces[name], **how} for name in ids} | {image_id: {"content": "<image>", **how}}
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    about = {f"{name}_token": piece for name, piece in pieces.items()} | {
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "model_max_length": config.text_config.max_position_embeddings,
    }
    return {
        "tokenizer_config.json": template("tokenizer_config.json") | about,
        "generation_config.json": template("generation_config.json") | generation,
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
    content, bos = template("tokenizer.json"), tokenizer.piece(tokenizer.bos_token_id)
    content["added_tokens"] = [{"id": i, "single_word": False, **token} for i, token in special.items()]
    content["model"] |= {
        "unk_token": tokenizer.piece(tokenizer.unk_token_id), "vocab": vocab,
        "merges": [f"{left} {right}" for *_, left, right in merges],
    }
    around = content["post_processor"]
    around["special_tokens"] = {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}}
    for sequence in (around["single"], around["pair"]):
        sequence.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
    return content
