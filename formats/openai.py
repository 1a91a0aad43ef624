"""OpenAI's own CLIP files (`ViT-L-14.pt` as a state dict): their tensors under HF's names."""

RENAMED = {
    "class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.", "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.", ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2.",
}


def openai_tensors(stored, source):
    """Select the vision tower of an OpenAI state dict, under our names: {name: Stored}."""
    if "visual.conv1.weight" not in stored:
        raise ValueError(f"{source} is not OpenAI's CLIP (no visual.conv1.weight); pass a folder with a config.json")
    visual = {name.removeprefix("visual."): tensor for name, tensor in stored.items() if name.startswith("visual.")}
    visual.pop("proj", None)  # into the space that images share with texts
    tower = {}
    for name, tensor in visual.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if ".in_proj_" in name:  # query, key and value in one matrix
            width = tensor.shape[0] // 3
            for number, part in enumerate(("q_proj.", "k_proj.", "v_proj.")):
                tower[name.replace("in_proj_", part)] = tensor.rows(number * width, (number + 1) * width)
        else:
            tower[name] = tensor
    return tower
