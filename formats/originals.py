"""Checkpoints as their authors released them, under HF's names: Meta's LLaMA (consolidated.NN.pth beside params.json, in one
shard or several), OpenAI's CLIP (`ViT-L-14.pt` as a state dict), and open_clip's, which has the same names and a config."""

from pathlib import Path

import torch

from formats.files import read_config, read_json, require_file
from formats.weights import Stored, open_file, open_tensors, openclip_path

NAMES = read_json(Path(__file__).with_name("originals.json"))  # whose names -> {theirs: ours}


def renamed(name, author):
    for theirs, ours in NAMES[author].items():
        name = name.replace(theirs, ours)
    return name


def meta_tensors(folder):
    """Read Meta's layout: (the values of a LlamaConfig, {our name: Stored}). Shards are joined, heads in HF's rotary order."""
    params, files, stored = read_config(folder, "params.json"), sorted(folder.glob("consolidated.*.pth")), {}
    if params.get("use_scaled_rope"):
        fix = "which does not say by which factor; load the HF folder of these weights"
        raise ValueError(f"unsupported use_scaled_rope in {folder}/params.json, {fix}")
    if not files:
        raise FileNotFoundError(f"no consolidated.*.pth in {folder}, beside its params.json")
    shards, width, norm_eps = [open_file(path) for path in files], params["dim"], params.get("norm_eps", 1e-6)
    count = width // shards[0]["layers.0.attention.wo.weight"].shape[1]
    if count != len(files):
        names = f"consolidated.00.pth to .{count - 1:02d}.pth"
        raise FileNotFoundError(f"{folder} holds {len(files)} of {count} shards, {names}; complete the download")
    for name in shards[0].keys() - {"rope.freqs"}:
        tensor = join(name, [shard[name] for shard in shards], width)
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = split_halves(tensor, width // params["n_heads"])
        stored[renamed(name, "Meta")] = tensor
    return {
        "hidden_size": width, "intermediate_size": stored["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": params["n_layers"], "num_attention_heads": params["n_heads"], "rms_norm_eps": norm_eps,
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"], "rope_theta": params.get("rope_theta", 10000.0),
        "max_position_embeddings": 2048 if norm_eps == 1e-6 else 4096,  # not in the file: LLaMA-2's eps is 1e-5
    }, stored


def join(name, parts, width):
    """Join the parts of a tensor from all shards. Norms are the same in each."""
    height, *columns = parts[0].shape
    if not columns or len(parts) == 1:
        return parts[0]
    if name.endswith(("wo.weight", "w2.weight")) or name.startswith("tok_embeddings") and columns[0] < width:
        shape = (height, columns[0] * len(parts))
        return Stored(shape, lambda a, b: torch.cat([part.read_rows(a, b) for part in parts], dim=1), parts[0].path)

    def read_rows(a, b):  # a slice ends where its part does
        return torch.cat([part.read_rows(max(a - i * height, 0), max(b - i * height, 0)) for i, part in enumerate(parts)])
    return Stored((height * len(parts), *columns), read_rows, parts[0].path)


def split_halves(stored, head_dim):
    """Reorder the rows of each head: Meta interleaves the pairs that the rotary positions turn, HF keeps halves apart."""
    def read_rows(start, stop):
        rows = stored.read().view(-1, head_dim // 2, 2, stored.shape[1])  # (heads, pair, half, width)
        return rows.transpose(1, 2).reshape(stored.shape)[start:stop]
    return Stored(stored.shape, read_rows, stored.path)


def original_clip(path):
    """Read the tower in OpenAI's file or open_clip's, or the folder of one: ({our name: Stored}, what its shapes do not say of
    a CLIPVisionConfig). None for any other folder, such as HF's."""
    if not (file := Path(path) if Path(path).is_file() else openclip_path(path)):
        return None
    config, ours = file.with_name("open_clip_config.json"), {}
    if file.name.startswith("open_clip"):
        require_file(config, "the config of these weights: OpenAI's and later ones differ in what they compute")
    if "visual.class_embedding" not in (stored := open_tensors(file)):
        fix = "pass one, or a folder with a config.json"
        raise ValueError(f"{file} is no ViT of OpenAI's CLIP (no visual.class_embedding); {fix}")
    for theirs in [name for name in stored if name.startswith("visual.") and name != "visual.proj"]:  # into the texts' space
        name, tensor = renamed(theirs.removeprefix("visual."), "OpenAI"), stored[theirs]
        parts = ("q_proj.", "k_proj.", "v_proj.") if ".in_proj_" in name else ("",)  # in one matrix
        height = tensor.shape[0] // len(parts)
        for i, part in enumerate(parts):
            ours[name.replace("in_proj_", part)] = tensor.rows(i * height, (i + 1) * height)
    return ours, open_clip_values(config) if config.is_file() else {}


def open_clip_values(path):
    """Return the values of a CLIPVisionConfig that an open_clip_config.json adds to the shapes of the tensors."""
    content = read_json(path)
    model, preprocess = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    vision = model.get("vision_cfg", {})
    plain = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size")
    if other := {key: value for key, value in vision.items() if key not in plain and value}:
        raise ValueError(f"{path}: unsupported vision_cfg {other}; this tower is CLIP's plain ViT")
    if not isinstance(vision.get("width"), int):
        raise ValueError(f"{path}: no width in its vision_cfg; is it open_clip's?")
    values = {f"image_{key}": preprocess[key] for key in ("mean", "std") if key in preprocess}
    heads, activation = vision["width"] // vision.get("head_width", 64), "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {"num_attention_heads": heads, "hidden_act": activation, **values}
