"""LLaMA agrees with transformers and with a real checkpoint, and its cache, batches and seeds change nothing they should not."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, TEXT
from safetensors.torch import load_file, save_file

from coords import CoordFormat
from formats.fast_cpu import InferenceLinear, pack_linears
from llama import KVCache, Llama, LlamaConfig, Tokenizer, rotary, rotate
from model import VARIANTS
from tools.plan import BytesAlive

PROMPTS = [[1, 5, 9], [1, 7, 8, 9, 10, 11, 12, 13], [1], [1, 30, 31, 5, 6]]


@pytest.fixture
def llama():
    """Random weights, large enough that answers differ from prompt to prompt."""
    torch.manual_seed(0)
    return Llama(TEXT).eval()


# ----- the same function as the reference


def test_logits_match_the_reference():
    """Grouped-query heads, untied head: transformers' logits to 1e-5 of the largest."""
    reference = load_file(GOLDEN / "llama/reference.safetensors")
    with torch.inference_mode():
        logits = Llama.from_pretrained(GOLDEN / "llama")(reference["input_ids"])
    assert logits.shape == (2, 12, 64)
    assert (logits - reference["logits"]).abs().max() <= 1e-5 * reference["logits"].abs().max()


def test_a_real_checkpoint_tells_its_known_story(real):
    """stories260K (tied head, 8 heads over 4): greedy text from the bos token alone is the one published with it."""
    folder = real("llama/stories260K")
    llama, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
    story = tokenizer.decode(llama.generate([[tokenizer.bos_token_id]], max_new_tokens=60)[0])
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )


def test_future_tokens_cannot_change_the_past(llama):
    """Another token at position 6 leaves the logits of positions 0 to 5 as they were, and changes its own."""
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])
    other = ids.clone()
    other[0, 6] = 99
    before, after = llama(ids), llama(other)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_rotary_scores_depend_only_on_distance():
    """Scores of a query at any of 12 positions with a key at any are the same 100 positions on, and equal along diagonals only."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 12, 16)  # the same query and the same key at each position

    def scores(start):
        cos, sin = rotary(torch.arange(start, start + 12)[None], LlamaConfig(head_dim=16), q.dtype)
        return (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]  # (12 queries, 12 keys)

    assert (scores(0) - scores(100)).abs().max() < 1e-4
    assert all(scores(0).diagonal(distance).std() < 1e-5 for distance in range(-10, 11))
    assert scores(0)[0].std() > 0.1


# ----- generation


def uncached(llama, ids, count):
    """Greedy decoding that runs everything anew for each token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_cached_generation_equals_uncached(llama):
    """The key/value cache changes no token, one prompt at a time or several of different lengths together."""
    answers = llama.generate(PROMPTS, 20)
    assert answers == [llama.generate([prompt], 20)[0] for prompt in PROMPTS]
    assert answers == [uncached(llama, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_a_shared_prefix_equals_prompts_that_spell_it_out(llama):
    """Prompts behind a prefilled cache give the answers of prefix + prompt, whatever their lengths."""
    prefixes, rows = [[1, 40, 41, 42, 43], [1, 50, 51, 52, 53]], [0, 0, 1, 1]
    cache = KVCache(TEXT, 2, 5, "cpu", torch.float32)
    with torch.inference_mode():
        llama.hidden(llama.embed_tokens(torch.tensor(prefixes)), cache=cache)
        cache.take_rows(rows, 5 + 8 + 12)
        answers = llama.generate(PROMPTS, 12, cache=cache)
    assert answers == [uncached(llama, prefixes[row] + prompt, 12) for row, prompt in zip(rows, PROMPTS, strict=True)]


def test_a_cache_is_spread_without_a_second_one():
    """LocVLM-L's, from 4 prefixes to 128 questions: at most a sixteenth more than the new cache is alive at a time."""
    config = VARIANTS["l"].text_config
    with BytesAlive([]) as alive:
        cache = KVCache(config, 4, 650, "meta", torch.bfloat16)
        cache.length = 650
        cache.take_rows([row // 32 for row in range(128)], 800)
        for keep in (range(60), range(20)):  # half of the questions are answered
            before = alive.now
            cache.take_rows(list(keep))
            assert alive.peak <= 2 * 2 * 32 * 128 * 32 * 800 * 128 * 17 / 16 and alive.now < before


def test_an_answer_ends_before_its_end_token(llama):
    """The end token is not part of the answer, and a row that has ended does not stop the others."""
    full = llama.generate(PROMPTS, 20)
    end = full[0][3]
    for whole, cut in zip(full, llama.generate(PROMPTS, 20, eos_token_id=end), strict=True):
        assert cut == (whole[: whole.index(end)] if end in whole else whole)
    assert len(llama.generate(PROMPTS, 20, eos_token_id=end)[0]) <= 3


def test_sampling_repeats_with_its_seed_and_not_with_another(llama):
    """Temperature draws; the seed decides what."""
    once, again, other = (llama.generate(PROMPTS, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert once == again
    assert once != other
    assert llama.generate(PROMPTS, 20, temperature=1e-4, seed=5) == llama.generate(PROMPTS, 20)


def test_a_sampled_answer_does_not_depend_on_its_company(llama):
    """A row draws from a generator of its own: alone, in a batch, or in another order."""
    together = llama.generate(PROMPTS, 20, temperature=1.0, seed=3)
    assert together == [llama.generate([prompt], 20, temperature=1.0, seed=3)[0] for prompt in PROMPTS]
    assert together[::-1] == llama.generate(PROMPTS[::-1], 20, temperature=1.0, seed=3)


def test_one_prompt_under_several_keys_is_sampled_several_times(llama):
    """Else each of a thousand blank images would get the same answer, and its share would be 0 or 100 %."""
    many = llama.generate(PROMPTS[:1] * 8, 20, temperature=1.0, seeded_by=range(8))
    assert len(set(map(tuple, many))) > 4
    assert many[3:4] == llama.generate(PROMPTS[:1], 20, temperature=1.0, seeded_by=[3])


def test_what_cannot_be_generated_is_refused(llama):
    """An empty prompt, and more tokens than the model has positions for."""
    with pytest.raises(ValueError, match="an empty prompt"):
        llama.generate([[1], []], 4)
    with pytest.raises(ValueError, match="max_position_embeddings = 512"):
        llama.generate([[1] * 500], 13)
    with pytest.raises(ValueError, match="temperature -1"):
        llama.generate([[1]], 4, temperature=-1)
    assert len(llama.generate([[1] * 500], 12)[0]) == 12


def test_what_makes_inference_fast_changes_no_token(llama):
    """oneDNN's layout of the weights: the same greedy answers, one row or several."""
    prompts = [[1, 5, 9], [1, 7], [1, 30, 31, 32, 33]]
    wanted = llama.generate(prompts, 20)
    fast = copy.deepcopy(llama).for_inference()
    assert any(isinstance(module, InferenceLinear) for module in fast.modules()) == hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert fast.generate(prompts, 20) == wanted
    assert [fast.generate([prompt], 20)[0] for prompt in prompts] == wanted


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_generation_changes_no_token(llama):
    """torch.compile of the blocks, with the streaming product of a single row."""
    prompts = [[1, 5, 9], [1, 7]]
    wanted = llama.generate(prompts, 12)
    fast, calls = copy.deepcopy(llama).for_inference(compile=True), []
    fast.one_token_layers = [lambda *a, layer=layer: calls.append(1) or layer(*a) for layer in fast.one_token_layers]
    assert [fast.generate([prompt], 12)[0] for prompt in prompts] == wanted
    assert len(calls) == 2 * 11 * 2, "prompts x tokens after the first x layers"
    assert fast.generate(prompts, 12) == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_done_leave_the_batch(llama, monkeypatch, temperature):
    """Answers of very different length: the long one goes on alone, with the answer it has alone, and is told as it comes."""
    prompts, how = [[1, 5, 9], [1, 7], [1, 5, 9], [1, 5, 9]], {"temperature": temperature}  # row 1, which is padded, stays
    alone = [llama.generate([prompt], 24, **how)[0] for prompt in prompts]
    eos = next(token for token in alone[0][:20] if token not in alone[1])
    wanted = [llama.generate([prompt], 24, eos, **how)[0] for prompt in prompts]
    sizes, hidden, told = [], llama.hidden, []
    monkeypatch.setattr(llama, "hidden", lambda x, *rest: (sizes.append(len(x)), hidden(x, *rest))[1])
    assert llama.generate(prompts, 24, eos, **how, on_token=lambda row, ids: told.append((row, tuple(ids)))) == wanted
    assert (sizes[0], sizes[-1]) == (4, 1)
    assert sorted(told) == sorted((row, tuple(a[:n])) for row, a in enumerate(wanted) for n in range(1, len(a) + 1))


# ----- configs and files


@pytest.mark.parametrize(
    "foreign",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 4096},
        {"num_local_experts": 8},
        {"quantization_config": {"bits": 4}},
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
    ],
)
def test_a_decoder_that_is_not_a_plain_llama_is_refused_by_name(foreign):
    """Rotations we lack, biases of the MLP, experts, other families: silently loaded they would talk nonsense."""
    name = "rope" if "rope" in next(iter(foreign)) else next(iter(foreign))
    with pytest.raises(ValueError, match=name):
        LlamaConfig.from_dict(foreign)


def test_old_and_new_config_files_say_the_same():
    """Key/value heads may be absent, rope_theta at the top (old) or nested (transformers 5)."""
    old = LlamaConfig.from_dict({"num_attention_heads": 8, "hidden_size": 64, "rope_theta": 5e5, "rope_scaling": None})
    new = LlamaConfig.from_dict(
        {
            "num_attention_heads": 8,
            "hidden_size": 64,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        }
    )
    assert old == new
    assert (old.head_dim, old.rope_theta, LlamaConfig.from_dict({}).rope_theta) == (8, 5e5, 1e4)
    assert LlamaConfig.from_dict({"text_config": None}) == LlamaConfig(), "an empty part is no part"


def test_shards_a_tied_head_and_old_rotary_tables_load(tmp_path, llama):
    """The layout of large checkpoints: an index, several files, no lm_head where it is tied, inv_freq where files are old."""
    torch.manual_seed(0)
    tied = Llama(replace(TEXT, tie_word_embeddings=True))
    tensors = {
        f"model.{name}": tensor.clone() for name, tensor in tied.state_dict().items() if name != "lm_head.weight"
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({**vars(tied.config), "model_type": "llama"}))
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(loaded(torch.tensor([PROMPTS[1]])), tied(torch.tensor([PROMPTS[1]])))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        Llama.from_pretrained(tmp_path)


def test_a_wrong_weight_file_is_refused_by_the_name_of_the_tensor(tmp_path):
    """Biases that its config does not name; a layer less is missing."""
    config, tensors = (GOLDEN / "llama/config.json").read_text(), load_file(GOLDEN / "llama/model.safetensors")
    (tmp_path / "config.json").write_text(config)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected: layers.0.self_attn.q_proj.bias"):
        Llama.from_pretrained(tmp_path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="missing: layers.1.input_layernorm.weight"):
        Llama.from_pretrained(tmp_path)


# ----- the tokenizer


def test_the_tokenizer_of_llama_is_read_as_it_is(real):
    """Special ids come from the file; the chunks around LLaVA's image begin and end as measured there."""
    tokenizer = Tokenizer(real("llama/tokenizer-llama"))
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (32000, 1, 2)
    assert tokenizer.encode("ASSISTANT USER: ")[-1] == 29871  # a lone space piece
    assert tokenizer.encode("\nWhere")[:2] == [29871, 13]
    assert (
        tokenizer.decode(tokenizer.encode("There is no such object in the image"))
        == "There is no such object in the image"
    )


def test_a_linear_layer_of_ones_own_is_not_packed():
    """A subclass may compute more than its product; packing would leave that out in silence."""
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = torch.nn.Sequential(Doubled(8, 8), torch.nn.Linear(8, 8)), torch.randn(3, 8)
    expected = model(x)
    pack_linears(model)
    assert torch.allclose(model(x), expected, atol=1e-5) and type(model[0]) is Doubled


def test_the_three_forms_cost_what_the_readme_says(real):
    """Digits are single pieces and each number after ', ' costs one more: 15 pieces for the paper's IVB box."""
    tokenizer = Tokenizer(real("llama/tokenizer-llama"))
    box, answers = (10, 120, 30, 145), {}
    for kind in ("nfp", "ivb", "diga"):
        text = CoordFormat(kind).encode_box(box, (512, 512))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        answers[kind] = len(tokenizer.encode("It is located at " + text))
    assert len(tokenizer.encode("(4, 52, 13, 63)")) == 15
    assert answers == {"nfp": 36, "ivb": 19, "diga": 23}


def test_a_tokenizer_of_our_own_reads_back_what_it_wrote(tokenizer):
    """Numbers digit by digit, line ends and unknown letters through bytes."""
    text = "It is located at (4, 52, 13, 63)\nça"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 400)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """Missing or not sentencepiece: the file is named."""
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("no pieces")
    with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
        Tokenizer(tmp_path)
