"""LLaMA (Touvron et al. 2023): the decoder, its key/value cache, sampling, and its sentencepiece tokenizer.

RMSNorm, rotary positions in HF's split-halves convention (Meta's interleaves the pairs: the same function of permuted
weights), SwiGLU, grouped-query heads where there are fewer key/value heads. Parameter names are those of HF
`LlamaForCausalLM` without the leading `model.`, so that checkpoints load strictly; Meta's own files load as well.

Read `Llama.forward` first; `Llama.generate` is the same path with a cache. Text only here: images enter in model.py.

    B batch   T tokens   D hidden_size   H heads   G key/value heads   K head size   V vocabulary   L cache length
"""

import math
import zlib
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import Stored, TorchFile, build, open_tensors, read_config, require_file, sort_tensors


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
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, see `rotary_frequencies`
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
        config = {**config, **config.get("text_config", {})}
        # Scaling of positions has had three homes: rope_scaling with "type", then with "rope_type", then rope_parameters
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        foreign = {
            "model_type": config.get("model_type", "llama") not in ("llama", "llava", "llava_llama"),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "rope_scaling": rope_type not in ("default", "linear", "llama3"),
            "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
            "sliding_window": config.get("sliding_window"),
            "num_local_experts": config.get("num_local_experts", config.get("num_experts")),
            "quantization_config": config.get("quantization_config"),
        }
        for key, is_foreign in foreign.items():
            if is_foreign:
                given = rope if key == "rope_scaling" else config.get(key)
                raise ValueError(
                    f"{key} = {given!r}; expected a plain LLaMA, which has no such thing; use another checkpoint"
                )
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known["rope_scaling"] = None if rope_type == "default" else {**rope, "rope_type": rope_type}
        known["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        return cls(**known)


class KVCache:
    """Keys and values of B rows for L positions, allocated once: (layers, B, G, L, K) each. `length` are filled."""

    def __init__(self, config, rows, capacity, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def of_layer(self, layer):
        """What a block needs: its keys and values (B, G, L, K), and how many of them are filled."""
        return self.keys[layer], self.values[layer], self.length

    def spread(self, rows, capacity=None):
        """Copy the filled part into a new cache, whose row i continues our row rows[i]."""
        layers, _, heads, length, size = self.keys.shape
        wider = copy(self)
        wider.keys, wider.values = (
            old.new_empty(layers, len(rows), heads, capacity or length, size) for old in (self.keys, self.values)
        )
        for new, old in enumerate(rows):
            wider.keys[:, new, :, : self.length] = self.keys[:, old, :, : self.length]
            wider.values[:, new, :, : self.length] = self.values[:, old, :, : self.length]
        return wider


def recomputed(function, *inputs):
    """Call a function whose intermediate results are not kept for the backward pass but computed again there.

    Meant for elementwise work, which costs next to nothing and leaves results as large as a matrix product's. A product at
    the end is not repeated: recomputation stops at its input, the last thing that was kept.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return recomputed(self.norm, x)

    def norm(self, x):
        # in float32, whatever x is: the square of a bf16 loses the small ones
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_frequencies(config, device):
    """How fast each pair of a head turns: radians a position, (K/2,).

    Scaled checkpoints read further than they were trained for by turning more slowly: "linear" all pairs alike, "llama3"
    only those too slow for a whole turn in the old length, smoothly between.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))


def rotary(positions, config, dtype):
    """Positions (B, T) -> cos and sin (B, 1, T, K), the same angles for both halves of a head."""
    angles = positions.float().unsqueeze(-1) * rotary_frequencies(config, positions.device)  # (B, T, K/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle: scores then depend on distance only."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). cache: what `KVCache.of_layer` gives, into which the new keys and values go, or None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
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
            keys, values, start = cache
            end = start + k.shape[2]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """x (B, T, D) -> (B, T, D): SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return recomputed(self.gated, self.gate_proj(x), self.up_proj(x))

    def gated(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # True: of the whole block, keep only x for the backward pass

    def forward(self, *inputs):
        return recomputed(self.body, *inputs) if self.recompute else self.body(*inputs)

    def body(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class InferenceLinear(nn.Module):
    """A linear layer on a CPU, as fast as the weights come from memory: no gradients.

    Plain matrix products of few rows leave most of the memory's bandwidth unused there. oneDNN's do not, on weights in its
    own layout, and are no slower at many; for a single row a compiled multiply-and-add streams as a sum does (`compiled`:
    weights in both forms, no bias).
    """

    def __init__(self, linear, compiled):
        super().__init__()
        self.weight, self.stream, self.bias = None, None, None if linear.bias is None else linear.bias.detach()
        if compiled and linear.bias is None:
            self.weight, self.stream = linear.weight.detach(), torch.compile(lambda weight, row: (weight * row).sum(-1))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, x):
        if self.stream is not None and x.shape[:-1].numel() == 1:
            return self.stream(self.weight, x.flatten()).view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], None)


def pack_linears(model, compiled=False):
    """Change the layout of a model's linear layers for inference, where that helps: on a CPU, for good."""
    like = next(model.parameters())
    if like.device.type != "cpu" or like.dtype == torch.float16 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    try:
        torch.ops.mkldnn._reorder_linear_weight(like.new_zeros(8, 8), 8)
    except RuntimeError:  # bfloat16 on a CPU that has no instructions for it
        return
    for module in list(model.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear):
                setattr(module, name, InferenceLinear(linear, compiled))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compiled = None  # see for_inference
        self.tie()

    def tie(self):
        """Make head and embedding one matrix, where the config says so (again, after filling)."""
        if self.config.tie_word_embeddings:
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
        if mask is not None:  # as what is added to scores: attention would make it of the booleans in every layer
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, -math.inf)
        cos, sin = rotary(positions, self.config, x.dtype)
        # where compiled blocks are the faster ones, see for_inference
        one = x.shape[1] == 1 and (len(x) == 1 or x.is_cuda)
        for layer, block in enumerate(self.compiled if one and self.compiled else self.layers):
            x = block(x, cos, sin, mask, None if cache is None else cache.of_layer(layer))
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def for_inference(self, compile=False):
        """Make generation fast, for good: the model cannot be trained or saved after. Gives itself.

        On a CPU, linear layers change their layout. `compile` joins the operations of a block by torch.compile where one
        token follows (a minute at first, and a C++ compiler): on a CPU for a single row, which then costs what reading the
        weights costs, on a GPU for any number.
        """
        pack_linears(self, compile)
        if compile:
            self.compiled = [torch.compile(block) for block in self.layers]
        return self

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, eos_token_id=None, temperature=0.0, seed=0, prefix=None, on_token=None):
        """Continue prompts of different lengths together: list of id lists -> list of id lists (without the end token).

        temperature  0 takes the most likely token; else multinomial over softmax(logits / temperature)
        prefix       KVCache that every prompt continues, one row each (see `KVCache.spread`), or None; its capacity
                     must hold the longest prompt and max_new_tokens more
        on_token     called with (row, its ids so far) for each new token, before the next is computed
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

        answers, rows = [[] for _ in prompts], list(range(len(prompts)))  # rows: which prompt each row of the batch is
        running = set(rows)
        for step in range(max_new_tokens):
            x = self.hidden(self.embed_tokens(ids), positions, mask, cache)
            logits = self.lm_head(x[:, -1]).float()  # (B, V)
            if temperature > 0:
                probabilities = (logits / temperature).softmax(-1).cpu()
                chosen = [
                    int(torch.multinomial(p, 1, generator=generators[row]))
                    for p, row in zip(probabilities, rows, strict=True)
                ]
            else:
                chosen = logits.argmax(-1).tolist()
            for row, token in zip(rows, chosen, strict=True):
                if token == eos_token_id:
                    running.discard(row)
                if row in running:
                    answers[row].append(token)
                    if on_token:
                        on_token(row, answers[row])
            if not running:
                break
            if 2 * len(running) <= len(rows):  # most are done: go on with the others alone
                keep = [place for place, row in enumerate(rows) if row in running]
                cache = cache.spread(keep)
                rows, chosen, pads, seen = [rows[i] for i in keep], [chosen[i] for i in keep], pads[keep], seen[keep]
            ids = torch.tensor(chosen, device=device)[:, None]
            positions = (past + longest + step - pads)[:, None]
            mask = seen[:, None, None, : past + longest + step + 1]
        return answers

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a HF LLaMA-family folder, the LLaMA inside a LLaVA, or Meta's consolidated.NN.pth with params.json."""
        if (Path(folder) / "params.json").is_file():
            return cls.from_stored(*meta_tensors(Path(folder)), folder, dtype, device)
        config = LlamaConfig.from_dict(read_config(folder))
        tensors = sort_tensors(open_tensors(folder), folder)["language_model"]
        return cls.from_stored(config, tensors, folder, dtype, device)

    @classmethod
    def from_stored(cls, config, stored, source, dtype=torch.float32, device="cpu"):
        """Build from name -> Stored. The vocabulary is the tensors': LLaVAs have added words without telling their config."""
        stored = dict(stored)
        if "embed_tokens.weight" in stored:
            config = replace(config, vocab_size=stored["embed_tokens.weight"].shape[0])
            if config.tie_word_embeddings:
                stored["lm_head.weight"] = stored["embed_tokens.weight"]
        llama = build(lambda: cls(config), stored, source, dtype, device)
        llama.tie()
        return llama


def meta_tensors(folder):
    """Read Meta's layout: (LlamaConfig, name -> Stored under our names), shards joined, rotary pairs in HF's order."""
    params = read_config(folder, "params.json")
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(
            f"no consolidated.*.pth in {folder}; expected them beside params.json; complete the folder"
        )
    shards = [TorchFile(require_file(path, "a shard")).stored() for path in files]
    width, heads = params["dim"], params["n_heads"]
    kv_heads, size = params.get("n_kv_heads") or heads, params["dim"] // params["n_heads"]
    count = width // shards[0]["layers.0.attention.wo.weight"].shape[1]
    if count != len(files):
        raise FileNotFoundError(
            f"{folder} holds {len(files)} of {count} shards; expected consolidated.00.pth to .{count - 1:02d}.pth; "
            "complete the download"
        )

    def join(name):
        """One tensor out of the shards; norms are copies."""
        parts = [shard[name] for shard in shards]
        if len(parts[0].shape) == 1 or len(parts) == 1:
            return parts[0]
        by_column = name.endswith(("wo.weight", "w2.weight")) or (
            name.startswith("tok_embeddings") and parts[0].shape[1] < width
        )
        shape = list(parts[0].shape)
        shape[int(by_column)] *= len(parts)

        def read_rows(start, stop):
            if by_column:
                return torch.cat([part.read_rows(start, stop) for part in parts], dim=1)
            rows = []
            for number, part in enumerate(parts):
                before = number * part.shape[0]
                rows.append(part.read_rows(max(0, start - before), max(0, min(stop - before, part.shape[0]))))
            return torch.cat(rows)

        return Stored(tuple(shape), read_rows, files[0])

    def half_split(stored, heads):
        """Rows of each head from (pair, half) to (half, pair) order."""

        def read_rows(start, stop):
            return stored.read().view(heads, size // 2, 2, -1).transpose(1, 2).reshape(stored.shape)[start:stop]

        return Stored(stored.shape, read_rows, stored.path)

    ours = {
        "tok_embeddings": "embed_tokens",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    stored = {}
    for name in shards[0].keys() - {"rope.freqs"}:
        tensor = join(name)
        if name.endswith("attention.wq.weight"):
            tensor = half_split(tensor, heads)
        if name.endswith("attention.wk.weight"):
            tensor = half_split(tensor, kv_heads)
        for theirs, our in ours.items():
            name = name.replace(theirs + ".", our + ".")
        stored[name] = tensor
    norm_eps = params.get("norm_eps", 1e-6)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=stored["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=norm_eps,
        rope_theta=params.get("rope_theta", 10000.0),
        # not in the file: LLaMA-1 (2048) has eps 1e-6, LLaMA-2 (4096) 1e-5
        max_position_embeddings=2048 if norm_eps == 1e-6 else 4096,
    )
    return config, stored


class Tokenizer:
    """LLaMA's sentencepiece tokenizer: text <-> ids. Special ids are the file's (config.json files are known to lie)."""

    def __init__(self, folder):
        self.path = Path(folder) / "tokenizer.model"
        if not self.path.is_file() and (Path(folder) / "params.json").is_file():
            self.path = Path(folder).parent / "tokenizer.model"  # Meta keeps it beside the models' folders
        require_file(self.path, "the tokenizer that belongs to the weights")
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
