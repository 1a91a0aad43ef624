"""LLaMA (Touvron et al. 2023): the decoder, its key/value cache, generation, and its sentencepiece tokenizer.

RMSNorm, rotary positions in HF's split-halves convention (Meta's interleaves the pairs: the same function with permuted
weights), SwiGLU, grouped-query heads if there are fewer key/value heads. Parameter names are those of HF `LlamaForCausalLM`
without the leading `model.`, so checkpoints load strictly. Meta's own files load as well.

Read `Llama.hidden` first; training and `Llama.generate` both call it. This file is text only; images enter in model.py.

    B rows   T tokens   D hidden_size   H heads   G key/value heads   K head size   V vocabulary   L cache length
"""

import math
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from formats.fast_cpu import pack_linears
from formats.files import known_fields, read_config, require_file
from formats.hub import local
from formats.originals import meta_tensors
from formats.tokenizer_json import JSONTokenizer
from formats.weights import build, open_tensors, sort_tensors


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder, in the keys of HF config.json. The defaults are LLaMA-7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # absent in old files: one per head
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, see `rotary_frequencies`
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # in q, k, v and o
    model_type: str = "llama"  # or "qwen2", which has biases in q, k and v

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads, not a multiple of {self.num_key_value_heads} key/value heads")

    @classmethod
    def from_dict(cls, config):
        """Read a HF config. Raise ValueError for a feature that this decoder lacks; ignore other unknown keys."""
        config = {**config, **(config.get("text_config") or {})}
        # rope scaling has had three homes: rope_scaling with "type", then with "rope_type", then rope_parameters
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "model_type": config.get("model_type", "llama") not in ("llama", "llava", "llava_llama", "qwen2"),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "mlp_bias": config.get("mlp_bias", False),
            "rope_scaling": rope_type not in ("default", "linear", "llama3"),
            "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
            "sliding_window": config.get("use_sliding_window", True) and config.get("sliding_window"),
            "num_local_experts": config.get("num_local_experts", config.get("num_experts")),
            "quantization_config": config.get("quantization_config"),
        }
        for key, is_unsupported in unsupported.items():
            if is_unsupported:
                value = rope if key == "rope_scaling" else rope.get(key, config.get(key, config.get("num_experts")))
                raise ValueError(f"unsupported {key} {value!r}; this decoder is a plain LLaMA")
        needs = () if rope_type == "default" else ("factor",)
        if rope_type == "llama3":
            needs += ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if absent := [key for key in needs if not isinstance(rope.get(key), int | float)]:
            raise ValueError(f"rope_scaling {rope} lacks the number {absent[0]}; correct config.json")
        fields = known_fields(cls, config) | {"model_type": "qwen2" if config.get("model_type") == "qwen2" else "llama"}
        fields["rope_scaling"] = None if rope_type == "default" else {**rope, "rope_type": rope_type}
        fields["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        return cls(**fields)


class KVCache:
    """Keys and values of B rows for L positions, a pair of (B, G, L, K) for each layer. The first `length` are filled."""

    def __init__(self, config, rows, capacity, device, dtype):
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.layers = [[torch.empty(shape, device=device, dtype=dtype) for _ in ("keys", "values")] for _ in layers]
        self.length = 0

    def take_rows(self, rows, capacity=None):
        """Replace the rows by copies of rows[0], rows[1], ..., with room for `capacity` positions (by default, as before).

        Layer by layer, so that two whole caches are never alive.
        """
        for layer in self.layers:
            for which, old in enumerate(layer):
                new = old.new_empty(len(rows), old.shape[1], capacity or old.shape[2], old.shape[3])  # (rows, G, L, K)
                for row, source in enumerate(rows):
                    new[row, :, : self.length] = old[source, :, : self.length]
                layer[which] = new


# ----- the decoder, from leaf to root


def recomputed(function, *inputs):
    """Call a function, drop its intermediate results, and compute them again in the backward pass.

    Elementwise work is quick to repeat, while its results would take as much memory as those of a matrix product.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.RMSNorm):
    """x (..., D) -> the same shape, of unit mean square, times a weight. PyTorch squares in float32, whatever x is."""

    def forward(self, x):
        return recomputed(super().forward, x)


def rotary_frequencies(config, device):
    """Return how fast each pair of a head turns: radians per position, (K/2,).

    Checkpoints with scaling read further than they were trained for by turning more slowly: "linear" slows all pairs, "llama3"
    only those too slow for a whole turn in the old length, with a smooth transition.
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
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)  # (B, 1, T, K)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle, so that scores depend on distance only. Shapes stay."""
    left, right = x.chunk(2, dim=-1)  # (B, H, T, K/2) each
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). cache: (keys, values, positions filled) of this layer, or None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, size, has_bias = config.hidden_size, config.head_dim, config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, has_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, has_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, has_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, config.attention_bias)

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
            k, v = keys[:, :, :end], values[:, :, :end]  # (B, G, start + T, K)
        grouped = q.shape[1] != k.shape[1]  # H / G query heads share one key/value head
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)  # (B, H, T, K)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


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
        return self.down_proj(F.silu(gate) * up)  # this product is not run again: it is inside so that its input is not kept


class Block(nn.Module):
    """A pre-norm decoder block: x (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # True: keep only x for the backward pass, and compute the whole block again there

    def forward(self, *inputs):
        return recomputed(self.body, *inputs) if self.recompute else self.body(*inputs)

    def body(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.uses_flex, self.one_token_layers = False, None  # see compile_layers, for_inference
        self.tie()

    def tie(self):
        """Make head and embedding one matrix, if the config says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids):
        """Token ids (B, T) -> logits (B, T, V). Each position sees itself and those before it."""
        return self.lm_head(self.hidden(self.embed_tokens(input_ids)))

    def hidden(self, x, positions=None, mask=None, cache=None):
        """Embeddings (B, T, D) -> normed hidden states (B, T, D); `lm_head` turns them into logits.

        positions  long (B, T), for the rotation; by default 0, 1, 2 ... after the cached ones
        mask       bool (B, 1, T, L), True where a query may look; by default causal. L counts cached positions first. Or a
                   BlockMask, if the layers are compiled
        cache      KVCache, grows by T
        """
        past = 0 if cache is None else cache.length
        if past and mask is None:
            raise ValueError("a filled cache needs a mask over cached and new positions")
        if positions is None:
            positions = torch.arange(past, past + x.shape[1], device=x.device).expand(x.shape[:2])
        if torch.is_tensor(mask):  # attention adds floats to the scores; given booleans, it would convert them in every layer
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, -math.inf)
        cos, sin = rotary(positions, self.config, x.dtype)  # (B, 1, T, K)
        is_one_token = self.one_token_layers and x.shape[1] == 1 and (len(x) == 1 or x.is_cuda)  # see for_inference
        for layer, block in enumerate(self.one_token_layers if is_one_token else self.layers):
            x = block(x, cos, sin, mask, cache and (*cache.layers[layer], cache.length))
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def compile_layers(self, backend="inductor"):
        """Compile each block for training. Packed rows on a GPU then use FlexAttention, which a CPU cannot train with."""
        # all layers share this limit, and each stage and kind of mask takes two graphs: the first length, then any length
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.layers:  # `body` alone: fsdp's hooks around a call of the block stay outside the graph
            block.body = torch.compile(partial(Block.body, block), fullgraph=True, backend=backend)
        self.uses_flex = self.embed_tokens.weight.is_cuda

    def for_inference(self, compile=False):
        """Speed up generation irreversibly: the model cannot be trained or saved afterwards. Returns self.

        On a CPU, linear layers change their memory layout. `compile` applies torch.compile to the blocks, for steps of one
        token (takes a minute at first, and a C++ compiler): of one row on a CPU, of any number of rows on a GPU.
        """
        pack_linears(self, compile)
        if compile:
            self.one_token_layers = [torch.compile(block) for block in self.layers]
        return self

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, eos_token_id=None, temperature=0.0, seed=0, *, seeded_by=None, cache=None,
                 on_token=None):  # fmt: skip
        """Continue prompts of different lengths together: list of id lists -> list of id lists (without the end token).

        temperature  0 takes the most likely token; else multinomial over softmax(logits / temperature)
        cache        KVCache whose rows the prompts continue, or None; beyond its length, its capacity must hold the longest
                     prompt and max_new_tokens. It cannot be used again
        on_token     called with (number of the prompt, its ids so far) for each new token
        A row's answer does not depend on the other rows: padding lies between cache and prompt and is masked, and each
        row samples from its own generator, seeded by `seed` and its entry in `seeded_by`: by default its prompt.
        """
        if not prompts or not all(prompts):
            raise ValueError("an empty prompt; each needs at least one token id: start with the tokenizer's bos id")
        device = self.embed_tokens.weight.device
        longest, past = max(map(len, prompts)), 0 if cache is None else cache.length
        needed = past + longest + max_new_tokens
        if needed > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + longest} tokens and {max_new_tokens} new ones exceed max_position_embeddings = "
                f"{self.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )
        cache = cache or KVCache(self.config, len(prompts), needed, device, self.embed_tokens.weight.dtype)
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)  # (B,)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, T)
        choose = chooser(seeded_by or prompts, temperature, seed)

        # A row of the cache, with 3 positions filled, padding of 2 and a prompt of 2:   p p p . . q q a a a
        # Each query sees what is not padding and not later. Padding sees itself too: softmax over nothing is NaN.
        slots = torch.arange(needed, device=device)
        seen = (slots < past) | (slots >= past + pads[:, None])  # (B, L): not padding
        query_slots, key_slots = slots[past : past + longest, None], slots[: past + longest]
        is_causal, is_self = key_slots <= query_slots, key_slots == query_slots  # (T, past + T)
        mask = (seen[:, None, None, : past + longest] & is_causal) | is_self  # (B, 1, T, past + T)
        positions = (query_slots[:, 0] - pads[:, None]).clamp(min=0)  # (B, T)

        new_ids, prompt_of = [[] for _ in prompts], list(range(len(prompts)))  # number of the prompt that each row continues
        running = set(prompt_of)
        for step in range(max_new_tokens):
            x = self.hidden(self.embed_tokens(ids), positions, mask, cache)  # (B, T, D), then (B, 1, D)
            chosen = choose(self.lm_head(x[:, -1]).float(), prompt_of)  # logits (B, V) -> B ids
            for number, token in zip(prompt_of, chosen, strict=True):
                if token == eos_token_id:
                    running.discard(number)
                if number in running:
                    new_ids[number].append(token)
                    if on_token:
                        on_token(number, new_ids[number])
            if not running:
                break
            if 2 * len(running) <= len(prompt_of):  # half are done: continue with the others alone
                keep = [row for row, number in enumerate(prompt_of) if number in running]
                cache.take_rows(keep)
                pads, seen = pads[keep], seen[keep]
                prompt_of, chosen = [prompt_of[row] for row in keep], [chosen[row] for row in keep]
            ids = torch.tensor(chosen, device=device)[:, None]  # (B, 1)
            positions = (past + longest + step - pads)[:, None]  # (B, 1)
            mask = seen[:, None, None, : past + longest + step + 1]  # (B, 1, 1, L)
        return new_ids

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a HF LLaMA-family folder, the LLaMA inside a LLaVA, or Meta's consolidated.NN.pth with params.json."""
        if (Path(folder) / "params.json").is_file():
            config, tensors = meta_tensors(Path(folder))
            return cls.from_stored(LlamaConfig(**config), tensors, folder, dtype, device)
        config = LlamaConfig.from_dict(read_config(folder))
        tensors = sort_tensors(open_tensors(folder), folder)["language_model"]
        return cls.from_stored(config, tensors, folder, dtype, device)

    @classmethod
    def from_stored(cls, config, stored, source, dtype=torch.float32, device="cpu"):
        """Build from {name: weights.Stored}. The tensors say the vocabulary size: LLaVAs add words and keep their config."""
        stored = dict(stored)
        if "embed_tokens.weight" in stored:
            config = replace(config, vocab_size=stored["embed_tokens.weight"].shape[0])
            if config.tie_word_embeddings and "lm_head.weight" in stored:  # some configs claim a tie that the file breaks
                is_tied = torch.equal(stored["lm_head.weight"].read(), stored["embed_tokens.weight"].read())
                config = replace(config, tie_word_embeddings=is_tied)
            if config.tie_word_embeddings:
                stored["lm_head.weight"] = stored["embed_tokens.weight"]
        llama = build(lambda: cls(config), stored, source, dtype, device)
        llama.tie()
        return llama


def chooser(seeded_by, temperature, seed):
    """Return the function (logits (B, V), number of the prompt of each row) -> B token ids: greedy, or sampling."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 or more")
    if temperature == 0:
        return lambda logits, prompt_of: logits.argmax(-1).tolist()
    generators = [torch.Generator().manual_seed(seed ^ zlib.crc32(str(key).encode())) for key in seeded_by]

    def sample(logits, prompt_of):
        rows = zip((logits / temperature).softmax(-1).cpu(), prompt_of, strict=True)
        return [int(torch.multinomial(p, 1, generator=generators[number])) for p, number in rows]

    return sample


# ----- tokenizers


class Tokenizer:
    """LLaMA's sentencepiece tokenizer: text <-> ids. Special ids come from its file, because config.json files can be wrong.

    Another tokenizer (see TOKENIZERS) needs encode, decode, len(), path, bos_token_id (None: it has none), eos_token_id, piece
    and space. score and is_byte serve the export to tokenizer.json; without them, the file at `path` is saved as it is.
    """

    space = ""  # what goes before text that follows other text: `encode` adds a space by itself

    def __init__(self, folder):
        self.path = Path(folder) / "tokenizer.model"
        if not self.path.is_file() and (Path(folder) / "params.json").is_file():
            self.path = Path(folder).parent / "tokenizer.model"  # Meta keeps it beside the models' folders
        require_file(self.path, "the tokenizer that belongs to the weights, or its tokenizer.json")
        try:
            self._model = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            what = f"damaged ({error}), or LLaMA-3's tiktoken file; get its tokenizer.json instead"
            raise ValueError(f"{self.path} is not a sentencepiece model: it is {what}") from None
        bos, self.eos_token_id, self.unk_token_id = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        self.bos_token_id = None if bos < 0 else bos
        if self.eos_token_id < 0:
            raise ValueError(f"{self.path} has no end token, which every answer needs; use the tokenizer of a LLaMA")

    def __len__(self):
        return self._model.vocab_size()

    def encode(self, text):
        """Text -> ids, without special tokens. Each call adds sentencepiece's leading space, as LLaVA does for each chunk."""
        return self._model.encode(text)

    def decode(self, ids):
        """Ids -> text. Ids outside the vocabulary are dropped."""
        return self._model.decode([i for i in ids if 0 <= i < len(self)])

    def piece(self, i):
        return self._model.id_to_piece(i)

    def score(self, i):
        return self._model.get_score(i)

    def is_byte(self, i):
        return self._model.is_byte(i)


# file in a checkpoint folder -> the class that reads it; the first counts
TOKENIZERS = {"tokenizer.model": Tokenizer, "tokenizer.json": JSONTokenizer}


def read_tokenizer(folder):
    """Read the tokenizer of a checkpoint folder: the first of TOKENIZERS whose file exists."""
    folder = local(folder, "tokenizer*", "special_tokens_map.json", "config.json")
    found = (reader for name, reader in TOKENIZERS.items() if (Path(folder) / name).is_file())
    return next(found, Tokenizer)(folder)
