"""Checkpoints of whole models: read a run of ours, llava-hf's or LLaVA's own; write llava-hf's.

LLaVA-hf has a word for the image and an adapter of two layers. So a saved folder has added vocabulary rows for <image> (the
mean of the others: never the most likely), and a linear adapter has an identity as its second layer, without activation.
`read_checkpoint` undoes both. Our settings are in config.json's "locvlm", which others ignore.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from string import Template

import jinja2
import torch

from clip_vit import CLIPVisionConfig, CLIPVisionTower, mean_colour
from data import ASSISTANT, SYSTEM, USER
from formats.files import read_config, read_json, read_processor, read_text, sha256, write_json, write_text, write_whole
from formats.hub import local
from formats.weights import build, open_tensors, sort_tensors, without_contents, write_tensors
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
HERE = Path(__file__).parent
SETTINGS = ("geometry", "kind", "location", "words", "frames")  # of LocVLMConfig, saved under "locvlm"


def require_supported(folder, config):
    """Raise ValueError if a LLaVA's config.json asks for something that this model lacks."""
    for key, values in SUPPORTED.items():
        is_our_identity = key == "projector_hidden_act" and config.get("locvlm", {}).get("adapter") == "linear"
        if config.get(key, values[0]) not in values and not is_our_identity:
            raise ValueError(f"{folder}/config.json: unsupported {key} = {config[key]!r}, expected {values[0]!r}")


def read_checkpoint(folder, vision, adapters, dtype, device):
    """Read a whole model: (tower, adapter, LLaMA, tokenizer, settings of LocVLMConfig). See LocVLM.from_pretrained."""
    config = read_config(folder)
    require_supported(folder, config)
    ours, llama_config = config.get("locvlm", {}), LlamaConfig.from_dict(config)
    parts = sort_tensors(open_tensors(folder), folder)
    language, tower = parts["language_model"], read_tower(folder, config, parts["vision_tower"], vision, dtype, device)
    if "vocab_size" in ours:  # drop the rows added for <image>
        for name in {"embed_tokens.weight", "lm_head.weight"} & language.keys():
            language[name] = language[name].rows(0, ours["vocab_size"])
    llama = Llama.from_stored(llama_config, language, f"{folder} (LLaMA)", dtype, device)
    adapter = read_adapter(folder, adapters, (tower.config.hidden_size, llama.config.hidden_size), dtype, device)
    tokenizer = read_tokenizer(folder)
    if not ours and device != "meta":  # else an evaluation, which loads shapes first, says it twice
        templates = [read_text(path) for path in local(folder, "chat_template*").glob("chat_template.*")]
        if templates and not any(ASSISTANT in text for text in templates):
            print(f"{folder} has another chat template; it is asked as LLaVA-1.5 is (USER: ... {ASSISTANT}), so answers may be poor")
    if ours and sha256(tokenizer.path) != ours["tokenizer_sha256"]:
        hint = f"use the one whose sha256 begins {ours['tokenizer_sha256'][:12]}"
        raise ValueError(f"{tokenizer.path} is not the tokenizer that these weights were trained with; {hint}")
    settings = {key: ours[key] for key in SETTINGS if key in ours}
    return tower, adapter, llama, tokenizer, {"geometry": ours.get("geometry") or geometry_of(folder, config), **settings}


def read_tower(folder, config, stored, vision, dtype, device):
    """Read the tower inside a checkpoint, or the one at `vision`."""
    if stored:
        if vision:
            raise ValueError(f"{folder} holds its own vision tower; leave out --vision {vision}")
        has_config, values = "vision_config" in config, read_processor(folder)
        shape = CLIPVisionConfig.from_dict(config, values) if has_config else CLIPVisionConfig.from_shapes(stored)
        return build(lambda: CLIPVisionTower(shape), stored, f"{folder} (vision tower)", dtype, device)
    if not vision:
        clip = config.get("mm_vision_tower", "its CLIP")
        raise ValueError(f"{folder} holds no vision tower; pass the folder of {clip} as --vision")
    return CLIPVisionTower.from_pretrained(vision, dtype, device)


def read_adapter(path, adapters, sizes, dtype=torch.float32, device="cpu"):
    """Read the adapter alone: of a run, which names its kind, of a LLaVA, or its mm_projector.bin. sizes: of CLIP and LLaMA."""
    stored = sort_tensors(open_tensors(path), path)["adapter"]
    folder = Path(path).parent if Path(path).is_file() else local(path, "config.json")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    require_supported(folder, config)
    kind = config.get("locvlm", {}).get("adapter") or ("mlp2x_gelu" if "linear_2.weight" in stored else "linear")
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
    processor = read_processor(folder)
    if not processor:
        print(f"{folder} has no preprocessor_config.json: images are cropped to a square, as CLIP does")
    size, is_crop = processor.get("size"), processor.get("do_center_crop", True)
    is_square = isinstance(size, dict) and "height" in size
    if is_square and is_crop:  # a crop as large as the square cuts nothing
        is_square = processor.get("crop_size", size) in (size, size["height"])
    return "pad" if processor.get("do_pad") else "squash" if is_square else "crop"


def write_checkpoint(model, folder, state_dict, notes):
    """Write a llava-hf folder, see LocVLM.save_pretrained."""
    config, tokenizer = model.config, model.tokenizer
    # <image> takes the first id that is no piece of the tokenizer, if that lacks it; rows are a multiple of 64, as llava-hf's
    image_id, vocab_size = getattr(tokenizer, "image_token_id", None) or len(tokenizer), config.text_config.vocab_size
    rows = vocab_size if image_id < vocab_size else 64 * (image_id // 64 + 1)
    write_tensors(folder / "model.safetensors", llava_tensors(model, state_dict or model.state_dict(), rows))
    # our `encode` puts a space before every chunk beside an image; "always" makes other readers do so
    pieces = re.sub(rb'("prepend_scheme":\s*)"first"', rb'\1"always"', tokenizer.path.read_bytes())
    write_whole(folder / tokenizer.path.name, lambda path: path.write_bytes(pieces))
    chat = Template("".join(read_json(HERE / "chat_template.json")))  # data.encode_prefix and encode_segment, for any turns
    write_text(folder / "chat_template.jinja", chat.substitute(SYSTEM=SYSTEM, USER=USER, ASSISTANT=ASSISTANT))
    files = json_files(config, tokenizer, image_id, rows)
    files["config.json"]["locvlm"] = {
        "adapter": config.adapter, **{key: getattr(config, key) for key in SETTINGS}, "n_bins": config.coord_format().side,
        "template": "v1", "vocab_size": vocab_size, "tokenizer_sha256": sha256(folder / tokenizer.path.name), **notes,
    }
    for name, content in files.items():
        write_json(folder / name, content)


def llava_tensors(model, state_dict, rows):
    """Return the weights under llava-hf's names, with `rows` rows of vocabulary and an adapter of two layers.
    Raise ValueError for layers of a reader's own, which nobody could read back."""
    config, tensors = model.config, {}
    with without_contents():
        names = type(model)(config).state_dict().keys()
    if foreign := [name for name in state_dict if name not in names]:
        count = f"{len(foreign)} tensors that are in no LocVLM ({foreign[0]})"
        raise ValueError(f"the weights hold {count}; merge them into its own before save_pretrained, as docs/exercises/lora.diff does")
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


def json_files(config, tokenizer, image_id, rows):
    """Fill in llava_hf.jinja: {file name: content}. rows: of the vocabulary; image_id: the row of <image>"""
    facts = {
        "adapter": config.adapter, "geometry": config.geometry, "mean_colour": mean_colour(config.vision_config),
        "vision": asdict(config.vision_config), "text": asdict(config.text_config) | {"vocab_size": rows},
        "image_id": image_id, "tokenizer": tokenizer, "vocab": None,
    }
    unk, bos, eos = getattr(tokenizer, "unk_token_id", None), tokenizer.bos_token_id, tokenizer.eos_token_id
    named = {"unk": unk, "bos": bos, "eos": eos, "pad": eos if unk is None else unk}
    facts["named"] = {name: i for name, i in named.items() if i is not None}
    facts["special"] = {i: tokenizer.piece(i) for i in facts["named"].values()} | {image_id: "<image>"}
    if hasattr(tokenizer, "score"):  # a sentencepiece model, for which a tokenizer.json is made
        vocab = facts["vocab"] = {tokenizer.piece(i): i for i in range(len(tokenizer))}
        merges = sorted(  # it implies that every pair of pieces that makes a piece merges, the best score first
            (-tokenizer.score(i), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
            for piece, i in vocab.items()
            if not (tokenizer.is_byte(i) or i in facts["special"])
            for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
        )
        facts["merges"] = [f"{left} {right}" for *_, left, right in merges]
    template = jinja2.Environment(finalize=json.dumps, undefined=jinja2.StrictUndefined).from_string
    return json.loads(template(read_text(HERE / "llava_hf.jinja")).render(facts))
