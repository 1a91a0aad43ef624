"""The whole model: agrees with transformers' Llava, packs k questions for the price of one image, and survives the disk."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TEXT, VISION, train_tokenizer
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from clip_vit import preprocess
from data import IGNORE, IMAGE_ID, collate, encode_prefix, encode_question, encode_segment, find_places, pack
from llama import Llama
from model import ADAPTERS, VARIANTS, LocVLM, LocVLMConfig, packed_mask, place_image

TURNS = [  # of three images, a different number of conversations each, one of them with two turns
    [
        [
            (
                "Where is the object described cup located in image in terms of (x1,y1,x2,y2) bbox?",
                "It is located at (4, 52, 13, 63)",
            )
        ],
        [("What is at location (4, 52, 13, 63) in image?", "There is a red circle.")],
        [("What is this?", "A cup."), ("Is there a dog?", "There is no such object in the image")],
    ],
    [[("Describe the object located at (1, 2)?", "There is a blue square.")]],
    [[("What is this?", "A cup.")], [("And this one here, in the corner?", "There is a dog.")]],
]
QUESTIONS = [[turns[0][0] for turns in segments] for segments in TURNS]


def pictures(number=3):
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30 + 9 * i, 50, 3), dtype=np.uint8))
        for i in range(number)
    ]


def pixel_values(number=3):
    return torch.randn(number, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def packed_rows(tokenizer, template):
    prefix = encode_prefix(tokenizer, template, VISION.num_patches)
    return [pack(prefix, [encode_segment(tokenizer, template, turns) for turns in segments], 512) for segments in TURNS]


def separate_rows(tokenizer, template):
    """The same conversations, a row each, and which image each row belongs to."""
    prefix = encode_prefix(tokenizer, template, VISION.num_patches)
    rows = [pack(prefix, [encode_segment(tokenizer, template, turns)], 512) for segments in TURNS for turns in segments]
    return rows, [image for image, segments in enumerate(TURNS) for _ in segments]


def loss_and_gradients(model, batch, images):
    model.zero_grad()
    loss = model(images, **batch, reduction="sum")
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ----- the same function as the reference


@pytest.fixture
def golden_llava(tmp_path, tokenizer, monkeypatch):
    """transformers' own checkpoint folder, with what ours adds: its `locvlm` part and a tokenizer, which has 64 pieces here."""
    small = type("Small", (list,), {"path": tokenizer.path})(range(64))
    monkeypatch.setattr("formats.llava_hf.read_tokenizer", lambda folder: small)
    shutil.copytree(GOLDEN / "llava", tmp_path / "llava")
    shutil.copyfile(tokenizer.path, tmp_path / "llava/tokenizer.model")
    config = json.loads((GOLDEN / "llava/config.json").read_text())
    config["locvlm"] = {
        "adapter": "mlp2x_gelu",
        "geometry": "squash",
        "kind": "ivb",
        "tokenizer_sha256": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
    }
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    reference = load_file(GOLDEN / "llava/reference.safetensors")
    reference["input_ids"].masked_fill_(reference["input_ids"] == config["image_token_index"], IMAGE_ID)
    return LocVLM.from_pretrained(tmp_path / "llava"), reference


def test_logits_loss_and_gradient_match_the_reference(golden_llava):
    """CLIP's last block but one, no class token, two-layer adapter, LLaMA: transformers' Llava to 1e-5, right-padded rows included."""
    model, reference = golden_llava
    real = reference["attention_mask"] == 1
    x = model.language_model.embed_tokens(reference["input_ids"].clamp(min=0))
    x = place_image(x, model.adapter(model.vision_tower(reference["pixel_values"])), find_places(reference["input_ids"]))
    assert_close(model.language_model.lm_head(model.language_model.hidden(x))[real], reference["logits"][real])

    positions = torch.arange(real.shape[1]).expand(real.shape)
    segments = torch.where(real, (positions >= 6).long(), -1)  # bos, a word, four patches, then one segment
    rows = {key: reference[key] for key in ("input_ids", "labels")} | {"segment_of": segments, "positions": positions}
    batch = collate([{key: rows[key][row][real[row]].tolist() for key in rows} for row in (0, 1)])
    assert torch.equal(batch["input_ids"], reference["input_ids"])
    loss = model(reference["pixel_values"], **{**batch, "segment_of": segments})
    loss.backward()
    assert_close(loss, reference["loss"])
    assert_close(model.adapter.linear_1.weight.grad, reference["adapter_gradient"])


def test_the_papers_adapters_have_the_papers_sizes():
    """4,198,400 parameters for one linear layer (B), 20,979,712 for the two of L; 256 and 576 visual tokens."""
    with torch.device("meta"):
        adapters = [ADAPTERS[VARIANTS[name].adapter](1024, 4096) for name in "bl"]
    counts = [sum(p.numel() for p in adapter.parameters()) for adapter in adapters]
    assert counts == [4_198_400, 20_979_712]
    assert [VARIANTS[name].vision_config.num_patches for name in "bl"] == [256, 576]


def test_loss_at_init_is_near_log_vocab(make_model, tokenizer):
    """A model that knows nothing is about as wrong as a guess."""
    batch = collate(packed_rows(tokenizer, "v1"))
    assert make_model()(pixel_values(), **batch).item() == pytest.approx(np.log(len(tokenizer)), abs=0.5)


# ----- several questions behind one image


@pytest.mark.parametrize("template", ["v1", "plain"])
@pytest.mark.parametrize("adapter", ["linear", "mlp2x_gelu"])
def test_k_questions_in_one_row_cost_what_k_rows_cost(make_model, tokenizer, template, adapter):
    """Loss and every gradient of rows with 3, 1 and 2 segments equal those of six rows of one, for chats and for captions."""
    model = make_model(adapter=adapter)
    rows, images = separate_rows(tokenizer, template)
    loss, gradients = loss_and_gradients(model, collate(packed_rows(tokenizer, template)), pixel_values())
    wanted, wanted_gradients = loss_and_gradients(model, collate(rows), pixel_values()[images])
    assert_close(loss, wanted)
    assert (
        gradients.keys() == wanted_gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    )
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).abs().max() <= 1e-5 * max(1, wanted_gradients[name].abs().max()), (
            name
        )


def test_the_vision_tower_learns_nothing(make_model, tokenizer):
    """It is frozen: no gradient reaches it, and none of its parameters asks for one."""
    model = make_model()
    _, gradients = loss_and_gradients(model, collate(packed_rows(tokenizer, "v1")), pixel_values())
    assert not any(name.startswith("vision_tower") for name in gradients)
    trainable = {name: any(p.requires_grad for p in part.parameters()) for name, part in model.named_children()}
    assert trainable == {"vision_tower": False, "adapter": True, "language_model": True}


def test_segments_see_the_prefix_and_themselves():
    """The mask of a row with a prefix of 2, segments of 2 and 1, and one padding token, drawn."""
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask.shape == (1, 1, 6, 6)
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask[0, 0]] == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xx..x.",
        "xx...x",
    ]


SEGMENTS = torch.tensor([[0] * 40 + [1] * 30 + [2] * 50 + [-1] * 8, [0] * 60 + [1] * 60 + [2] * 8])


def test_flex_attention_sees_what_the_mask_shows():
    """The same function makes both masks; FlexAttention (here its slow form) gives what SDPA gives, grouped heads included."""
    mask, blocks = packed_mask(SEGMENTS), packed_mask(SEGMENTS, as_blocks=True)
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 128, 128, device="cpu"), mask)
    llama, x = Llama(replace(TEXT, num_attention_heads=4, num_key_value_heads=2)), torch.randn(2, 128, TEXT.hidden_size)
    with torch.no_grad():
        assert_close(llama.hidden(x, mask=blocks)[SEGMENTS >= 0], llama.hidden(x, mask=mask)[SEGMENTS >= 0])


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_have_the_same_gradients(recompute):
    """In one graph for each block (fullgraph), whatever the length."""
    llama, gradients = Llama(replace(TEXT, num_hidden_layers=2)), []
    for block in llama.layers:
        block.recompute = recompute
    for is_compiled in (False, True):
        if is_compiled:
            llama.compile_layers(backend="aot_eager")
        for length in (128, 96, 64):
            x = llama.embed_tokens(torch.arange(2 * length).view(2, length) % TEXT.vocab_size)
            llama.hidden(x, mask=packed_mask(SEGMENTS[:, :length])).square().sum().backward()
        gradients.append({name: p.grad for name, p in llama.named_parameters() if p.grad is not None})
        llama.zero_grad(set_to_none=True)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_nothing_in_a_step_waits_for_contents(tokenizer):
    """A GPU works behind the program, which waits wherever it asks for a value. Fake tensors have none, and raise an error."""
    batch = collate(packed_rows(tokenizer, "v1"))
    with FakeTensorMode():
        fake = {key: torch.empty(t.shape, dtype=t.dtype) for key, t in batch.items()}
        loss = LocVLM(LocVLMConfig(VISION, TEXT))(torch.empty(pixel_values().shape), **fake, reduction="sum")
        loss.backward()


def test_answers_do_not_depend_on_company(make_model, tokenizer):
    """k questions about each of several images, ragged: token for token what separate calls answer, greedy and sampled."""
    model = make_model()
    for options in ({}, {"temperature": 0.7, "seed": 4}):
        together = model.generate(pictures(), QUESTIONS, max_new_tokens=16, **options)
        alone = [
            [model.generate([image], [[question]], max_new_tokens=16, **options)[0][0] for question in asked]
            for image, asked in zip(pictures(), QUESTIONS, strict=True)
        ]
        assert together == alone
        assert len({answer for answers in together for answer in answers}) > 3


def test_an_answer_is_what_decoding_token_by_token_gives(make_model, tokenizer):
    """No cache, no packing: run the model anew for each token over one written-out row."""
    model, image = make_model(), pictures()[1]
    question = QUESTIONS[0][1]
    answer = model.generate([image], [[question]], max_new_tokens=12)[0][0]
    visual = model.adapter(model.vision_tower(preprocess(image, VISION)[None]))
    ids, llama, said = (
        encode_prefix(tokenizer, "v1", VISION.num_patches) + encode_question(tokenizer, question),
        model.language_model,
        [],
    )
    while len(said) < 12:
        row = torch.tensor([ids + said])
        x = place_image(llama.embed_tokens(row.clamp(min=0)), visual, find_places(row))
        said.append(int(llama.lm_head(llama.hidden(x))[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    assert answer == tokenizer.decode([token for token in said if token != tokenizer.eos_token_id]).strip()


def test_what_makes_inference_fast_changes_no_answer(make_model):
    """The linear layers of tower and LLaMA in oneDNN's layout: the same patches but for rounding, the same answers."""
    model = make_model()
    patches, answers = model.encode_images(pictures()).detach(), model.generate(pictures(), QUESTIONS, max_new_tokens=16)
    model.for_inference()
    assert type(model.vision_tower.encoder["layers"][0].mlp.fc1) is not torch.nn.Linear or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    torch.testing.assert_close(model.encode_images(pictures()).detach(), patches, rtol=0, atol=1e-5)
    assert model.generate(pictures(), QUESTIONS, max_new_tokens=16) == answers


def test_images_may_come_as_pictures_paths_or_tensors(make_model, tmp_path):
    """The same answers; no question about an image is no answer about it; a list too few is refused."""
    model, image = make_model(), pictures(1)[0]
    image.save(tmp_path / "image.png")
    answers = [
        model.generate([given], [["What is this?"]], max_new_tokens=8)
        for given in (image, tmp_path / "image.png", str(tmp_path / "image.png"), preprocess(image, VISION))
    ]
    assert answers == answers[:1] * 4
    assert model.generate([image, image], [[], ["What is this?"]], max_new_tokens=8) == [[], answers[0][0]]
    assert model.generate([image], [[]]) == [[]]
    for questions in ([["a"], ["b"]], ["a"]):
        with pytest.raises(ValueError, match="1 images, and for them .*; pass a list of one list per image"):
            model.generate([image], questions)
    with pytest.raises(ValueError, match="pass a list of one list per image"):
        model.log_likelihood([image], [("Which?", "a")])


def test_given_answers_have_the_likelihood_that_the_loss_says(make_model, tokenizer, monkeypatch):
    """Scored together, an image once before all its answers, as each alone in a row of its own; without a turn, nothing."""
    model, prefix = make_model(), encode_prefix(tokenizer, "v1", VISION.num_patches)
    turns = [[(question, answer) for question in of_image for answer in ("left", "to the right")] for of_image in QUESTIONS]
    shapes, hidden = [], model.language_model.hidden
    monkeypatch.setattr(model.language_model, "hidden", lambda x, *rest: shapes.append(x.shape[:2]) or hidden(x, *rest))
    scored = model.log_likelihood(pictures(), turns)
    longest = max(sum(len(encode_segment(tokenizer, "v1", [turn])[0]) for turn in of_image) for of_image in turns)
    assert shapes == [(3, len(prefix) + longest)], "a row per image"
    for image, of_image, log_p in zip(pictures(), turns, scored, strict=True):
        for turn, of_turn in zip(of_image, log_p, strict=True):
            row = pack(prefix, [encode_segment(tokenizer, "v1", [turn])], 512)
            loss = model(preprocess(image, VISION)[None], **collate([row]), reduction="sum").item()
            assert sum(of_turn) == pytest.approx(-loss, rel=1e-5) and len(of_turn) == len(tokenizer.encode(turn[1])) + 1
    none, alone = model.log_likelihood(pictures(2), [[], turns[1]])
    assert none == [] and sum(alone, []) == pytest.approx(sum(scored[1], []), rel=1e-5)
    assert model.log_likelihood(pictures(1), [[]]) == [[]]
    with pytest.raises(ValueError, match="tokens exceed max_position_embeddings = 512; shorten the question or the answer"):
        model.log_likelihood(pictures(1), [[("What?", "left " * 400)]])


# ----- what carries loss, and what does not matter


def test_prompt_image_and_padding_carry_no_loss(tokenizer):
    """What is supervised is each answer and its end token, nothing else; each label is its own input id."""
    rows = packed_rows(tokenizer, "v1")
    batch, found = collate(rows), []
    for number, row in enumerate(rows):
        labels, ids, of_row = (torch.tensor(row[key]) for key in ("labels", "input_ids", "segment_of"))
        supervised = labels != IGNORE
        assert torch.equal(labels[supervised], ids[supervised])
        assert not supervised[of_row <= 0].any()
        for segment, turns in enumerate(TURNS[number], start=1):
            assert labels[supervised & (of_row == segment)].tolist() == [
                token for _, answer in turns for token in [*tokenizer.encode(answer), tokenizer.eos_token_id]
            ]
        found += [(number, label) for label in labels[supervised].tolist()]
    at, columns, targets = batch["targets"]
    assert list(zip(at.tolist(), targets.tolist(), strict=True)) == found
    assert (batch["segment_of"][at, columns] >= 0).all()


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_the_loss_is_each_answer_token_predicted_from_what_precedes_it(make_model, tokenizer, template):
    """By hand: log-probabilities of the answer tokens in one written-out row, shifted by one, averaged.

    A caption's first token is predicted from the image's last patch.
    """
    model, row = make_model(), separate_rows(tokenizer, template)[0][0]
    ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
    visual = model.adapter(model.vision_tower(pixel_values(1)))
    x = place_image(model.language_model.embed_tokens(ids.clamp(min=0)), visual, find_places(ids))
    predicted = F.log_softmax(model.language_model.lm_head(model.language_model.hidden(x))[0], dim=-1)
    by_hand = -torch.stack([predicted[t - 1, label] for t, label in enumerate(labels) if label != IGNORE]).mean()
    assert model(pixel_values(1), **collate([row])).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize(
    "rows_of",
    [packed_rows, lambda tokenizer, template: separate_rows(tokenizer, template)[0]],
    ids=["packed", "separate"],
)
def test_padding_changes_nothing(make_model, tokenizer, rows_of):
    """The losses of rows alone add up to that of the padded batch, and what the padding holds does not matter."""
    model, rows = make_model(), rows_of(tokenizer, "v1")
    images, batch = pixel_values(len(rows)), collate(rows)
    padding = torch.arange(batch["input_ids"].shape[1]) >= torch.tensor([[len(row["input_ids"])] for row in rows])
    together = model(images, **batch, reduction="sum")
    alone = sum(model(images[i : i + 1], **collate([row]), reduction="sum") for i, row in enumerate(rows))
    batch["input_ids"][padding] = 77
    assert_close(together, alone)
    assert model(images, **batch, reduction="sum") == together


def test_each_image_lands_on_its_own_placeholders():
    """The i-th image's patches replace the i-th row's placeholders, in order; words stay; a count that differs is refused."""
    ids = torch.tensor([[1, IMAGE_ID, IMAGE_ID, 5], [1, 6, IMAGE_ID, IMAGE_ID]])
    words, visual = torch.zeros(2, 4, 3), torch.arange(1, 5).view(2, 2, 1).expand(2, 2, 3).float()
    assert place_image(words, visual, find_places(ids))[..., 0].tolist() == [[0, 1, 2, 0], [0, 0, 3, 4]]
    with pytest.raises(ValueError, match=r"4 image placeholders but 2 visual tokens \(1 images of 2\)"):
        place_image(words, visual[:1], find_places(ids))


def test_another_image_changes_only_its_own_row(make_model, tokenizer):
    """Row 1's picture is nothing to row 0."""
    model, rows = make_model(), separate_rows(tokenizer, "v1")[0][:2]
    images, batch = pixel_values(2), collate(rows)
    other = torch.stack([images[0], images[1].flip(2)])
    answers = [batch["targets"][:, batch["targets"][0] == row] for row in (0, 1)]
    losses = [[model(given, **{**batch, "targets": of_row}).item() for of_row in answers] for given in (images, other)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


# ----- on disk


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "mlp2x_gelu", "geometry": "pad", "kind": "diga"},
        {"text_config": replace(TEXT, tie_word_embeddings=True)},
    ],
    ids=["linear", "mlp2x_gelu", "tied"],
)
def test_a_saved_model_comes_back_the_same(make_model, tokenizer, tmp_path, options):
    """Config, every tensor, the tokenizer: equal losses and answers, to the bit; saving over itself is harmless."""
    model = make_model(**options)
    model.save_pretrained(tmp_path / "saved")
    again = LocVLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "saved")
    again = LocVLM.from_pretrained(tmp_path / "saved").eval()
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    batch = collate(packed_rows(tokenizer, "v1"))
    assert torch.equal(model(pixel_values(), **batch), again(pixel_values(), **batch))
    assert model.generate(pictures(), QUESTIONS, max_new_tokens=8) == again.generate(
        pictures(), QUESTIONS, max_new_tokens=8
    )
    assert not any(p.requires_grad for p in again.vision_tower.parameters())
    assert not [path for path in (tmp_path / "saved").iterdir() if ".tmp" in path.name]


def test_another_tokenizer_is_refused(make_model, tmp_path):
    """Ids of another tokenizer mean other words, and every number would look plausible and be void."""
    make_model().save_pretrained(tmp_path / "saved")
    other = train_tokenizer(tmp_path / "other", extra="quite different words for the very same world")
    shutil.copyfile(other.path, tmp_path / "saved/tokenizer.model")
    with pytest.raises(ValueError, match="is not the tokenizer that these weights were trained with"):
        LocVLM.from_pretrained(tmp_path / "saved")


def test_options_that_are_none_are_refused():
    """Adapter, geometry and kind are checked before anything is built."""
    for options, hint in (
        ({"adapter": "mlp3x"}, "adapter 'mlp3x'"),
        ({"geometry": "stretch"}, "geometry 'stretch'"),
        ({"kind": "xywh"}, "coordinate kind 'xywh'"),
    ):
        with pytest.raises(ValueError, match=hint):
            LocVLMConfig(VISION, TEXT, **options)
