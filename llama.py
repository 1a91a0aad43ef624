"""LLaMA (Touvron et al. 2023): the decoder, its key/value cache, sampling, and its sentencepiece tokenizer.

RMSNorm, rotary positions in HF's split-halves convention (Meta's interleaves the pairs: the same function of permuted
weights), SwiGLU, grouped-query heads where there are fewer key/value heads. Parameter names are those of HF
`LlamaForCausalLM` without the leading `model.`, so that checkpoints load strictly.

Read `Llama.forward` first; `Llama.generate` is the same path with a cache. Text only here: images enter in model.py.

    B batch   T tokens   D hidden_size   H heads   G key/value heads   K head size   V vocabulary   L cache length
"""

import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.nn import functional as F

from checkpoint import load_strictly, read_config, read_tensors


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder, in the keys of HF config.json. The defaults are LLaMA-7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # absent in old files: as many as heads
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads over {self.num_key_value_heads} key/value heads; expected a multiple"
            )

    @classmethod
    def from_dict(cls, config):
        """Take what we know from a HF config; refuse by name what this decoder does not have."""
        config = config.get("text_config", config)
        rope = config.get("rope_parameters") or {}  # transformers 5 nests rope_theta
        foreign = {
            "model_type": config.get("model_type", "llama") != "llama",
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "rope_scaling": config.get("rope_scaling"),
            "rope_parameters": rope.get("rope_type", "default") != "default",
        }
        for key, is_foreign in foreign.items():
            if is_foreign:
                raise ValueError(
                    f"{key} = {config.get(key)!r}; expected a plain LLaMA, which has no such thing; use another checkpoint"
                )
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        return cls(**known)


class KVCache:
    """Keys and values of B rows for L positions, allocated once: (layers, B, G, L, K) each. `length` are filled."""

    def __init__(self, config, rows, capacity, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store T new positions of one layer; give all keys and values so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def spread(self, config, rows, capacity):
        """Copy the filled part into a new cache, whose row i continues our row rows[i]."""
        wider = KVCache(config, len(rows), capacity, self.keys.device, self.keys.dtype)
        wider.keys[:, :, :, : self.length] = self.keys[:, rows, :, : self.length]
        wider.values[:, :, :, : self.length] = self.values[:, rows, :, : self.length]
        wider.length = self.length
        return wider


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        # in float32, whatever x is: the square of a bf16 loses the small ones
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary(positions, head_dim, theta, dtype):
    """Positions (B, T) -> cos and sin (B, 1, T, K), the same angles for both halves of a head."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies  # (B, T, K/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle: scores then depend on distance only."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width, heads, kv_heads, size = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, H or G, T, K)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids):
        """Token ids (B, T) -> logits (B, T, V), each position seeing those before it."""
        return self.lm_head(self.hidden(self.embed_tokens(input_ids)))

    def hidden(self, x, positions=None, mask=None, cache=None):
        """Embeddings (B, T, D) -> normed hidden states (B, T, D), one product with `lm_head` away from logits.

        positions  long (B, T), for the rotation; by default 0, 1, 2 ... after what the cache holds
        mask       bool (B, 1, T, L), True where a query may look; by default causal. L counts cached positions first.
        cache      KVCache, grows by T
        """
        past = 0 if cache is None else cache.length
        if past and mask is None:
            raise ValueError("a filled cache and no mask; expected a mask over cached and new positions; build one")
        if positions is None:
            positions = torch.arange(past, past + x.shape[1], device=x.device).expand(x.shape[:2])
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, eos_token_id=None, temperature=0.0, seed=0, prefix=None):
        """Continue prompts of different lengths together: list of id lists -> list of id lists (without the end token).

        temperature  0 takes the most likely token; else multinomial over softmax(logits / temperature)
        prefix       KVCache that every prompt continues, one row each (see `KVCache.spread`), or None; its capacity
                     must hold the longest prompt and max_new_tokens more
        A row's answer does not depend on its company: padding goes between prefix and prompt and is never looked at,
        and each row draws from a generator of its own, seeded by (seed, prompt).
        """
        if not prompts or not all(prompts):
            raise ValueError(
                "an empty prompt; expected at least one prompt, and a token id in each; start with the tokenizer's bos id"
            )
        device = self.embed_tokens.weight.device
        longest, past = max(map(len, prompts)), 0 if prefix is None else prefix.length
        needed = past + longest + max_new_tokens
        if needed > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + longest} tokens and {max_new_tokens} to come; expected at most max_position_embeddings = "
                f"{self.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )
        cache = prefix or KVCache(self.config, len(prompts), needed, device, self.embed_tokens.weight.dtype)
        pads = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
        generators = [torch.Generator().manual_seed(seed ^ zlib.crc32(str(ids).encode())) for ids in prompts]

        # A row of the cache, with 3 of prefix, 2 of padding and a prompt of 2:   p p p . . q q a a a
        # Each query sees what is not padding and not later; padding also sees itself, for a row without a True is NaN.
        slots = torch.arange(needed, device=device)
        seen = (slots < past) | (slots >= past + pads[:, None])  # (B, L): not padding
        queries, keys = slots[past : past + longest, None], slots[: past + longest]
        mask = seen[:, None, None, : past + longest] & (keys <= queries) | (keys == queries)  # (B, 1, T, past + T)
        positions = (queries[:, 0] - pads[:, None]).clamp(min=0)

        answers, running = [[] for _ in prompts], [True] * len(prompts)
        for step in range(max_new_tokens):
            x = self.hidden(self.embed_tokens(ids), positions, mask, cache)
            logits = self.lm_head(x[:, -1]).float()  # (B, V)
            if temperature > 0:
                probabilities = (logits / temperature).softmax(-1).cpu()
                chosen = [
                    int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probabilities, generators, strict=True)
                ]
            else:
                chosen = logits.argmax(-1).tolist()
            for row, token in enumerate(chosen):
                running[row] = running[row] and token != eos_token_id
                if running[row]:
                    answers[row].append(token)
            if not any(running):
                break
            ids = torch.tensor(chosen, device=device)[:, None]
            positions = (past + longest + step - pads)[:, None]
            mask = seen[:, None, None, : past + longest + step + 1]
        return answers

    @classmethod
    def from_pretrained(cls, folder):
        """Load a HF LLaMA-family folder."""
        llama = cls(LlamaConfig.from_dict(read_config(folder)))
        load_strictly(llama, llama_tensors(read_tensors(folder), llama.config), folder)
        return llama


def llama_tensors(tensors, config):
    """Bring HF names to ours: no leading `model.`, no stored rotary tables, a tied head under both names."""
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.tie_word_embeddings and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors


class Tokenizer:
    """LLaMA's sentencepiece tokenizer: text <-> ids. Special ids are the file's (config.json files are known to lie)."""

    def __init__(self, folder):
        self.path = Path(folder) / "tokenizer.model"
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no {self.path}; expected the tokenizer that belongs to the weights; copy it into the folder"
            )
        try:
            self.pieces = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} is not a sentencepiece model ({error}); download or copy it again") from None
        self.bos_token_id, self.eos_token_id = self.pieces.bos_id(), self.pieces.eos_id()

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text):
        """Text -> ids, no special tokens. Each call adds sentencepiece's leading space, as LLaVA's chunks have it."""
        return self.pieces.encode(text)

    def decode(self, ids):
        return self.pieces.decode([i for i in ids if 0 <= i < len(self)])
