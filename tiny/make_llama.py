"""Train the tiny LLaMA that stands in for Vicuna, on text alone: `python tiny/make_llama.py` writes tiny/llama (HF format).

It learns the words of the shapes world, and to look things up in what it has read. A document is a scene told in
words, then questions about it in the chat form of stage 2, packed behind the shared telling as images are:

    retell  "small red circle at (12, 30, 50, 66). ..." three times, word for word or in new order; loss from the second
            time on, where everything can be copied. All that is read at first: it makes looking-up appear (LOG.md).
    told    the same up to three times in new order and wording, then questions
    bag     the scene as a grid of bags of words, one for each patch that a picture would have: several words laid on one
            position, their embeddings added, some heavier than others. A visual token holds several facts at once; a
            model this small must have met that before, while LLaMA-7B need not. Asked for its caption ("caption"), for
            colours and what is there ("drill"), for boxes by name ("place"), for names by box ("name"), for everything ("bag")

No picture is involved. The gate at the end asks held-out scenes.
"""

import math
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from checkpoint import write_json, write_tensors
from shapes import COLOURS, NAMES, article, caption, converse, describe, draw_scene, phrase, presence, side_of

from coords import iou
from data import (
    IGNORE,
    LOC_ANSWER,
    NEG_ANSWER,
    REV_ANSWER,
    REV_PROMPTS,
    SIDE_ANSWERS,
    SIDE_PROMPTS,
    SYSTEM,
    Wording,
    collate,
    encode_segment,
    loc_question,
    pack,
)
from llama import Llama, Tokenizer
from model import VARIANTS, answer_loss, packed_mask
from train import keep_freed_memory

HERE = Path(__file__).parent
CONFIG = VARIANTS["tiny"].text_config
FORMAT = VARIANTS["tiny"].coord_format()
GRID = FORMAT.grid
WORDING = Wording(FORMAT)
STEPS, BATCH, QUESTIONS = 6800, 8, 6
CYCLES, DECAY = (6050, STEPS), 600  # before each of these steps the learning rates fall to 0 over DECAY steps
LR_MUON, LR_ADAMW = 3e-3, 1.2e-3  # matrices of the blocks; embeddings, head and norms
WEIGHT = {"retell": 2, "told": 1, "caption": 4, "drill": 3, "bag": 2, "place": 3, "name": 3}  # of BATCH, by length
# Forms of documents, taken in turn, each tuple until that step. One easy thing at a time, and nothing else: copying, then
# finding what was told, then naming what lies in bags, then finding there by name, then by place; then all of it together,
# for what is not asked for is forgotten. All at once from the start, none of it is learned (LOG.md).
SCHEDULE = {
    200: ("retell",),
    500: ("told", "told", "told", "retell"),
    620: ("caption",),
    750: ("drill",),
    1000: ("place",),
    1200: ("name",),
    5500: ("bag", "place", "name", "told", "caption", "drill"),
    6050: ("place", "told", "place", "bag", "place", "name", "place", "told", "place", "caption", "place", "drill"),
    STEPS: ("place", "place", "name", "place", "place", "bag", "place", "told"),
}


# ----- documents


def tell(scene, rng):
    """One telling of a scene with coordinates, in random order and wording."""
    form = rng.choice(("{a} at {loc}", "there is {a} at {loc}", "at {loc} there is {a}", "{p}: {loc}"))
    shapes = rng.sample(scene.shapes, len(scene.shapes))
    return (
        ". ".join(
            form.format(a=article(phrase(scene, s)), p=phrase(scene, s), loc=FORMAT.encode_box(s.box_px, scene.size))
            for s in shapes
        )
        + "."
    )


def retell(scene, rng):
    """Three tellings in one wording, half of the time word for word."""
    parts = [f"{phrase(scene, s)} at {FORMAT.encode_box(s.box_px, scene.size)}" for s in scene.shapes]
    shuffled = rng.random() < 0.5
    return [". ".join(rng.sample(parts, len(parts)) if shuffled else parts) + "." for _ in range(3)]


def bags(scene, tokenizer, rng):
    """The scene as GRID x GRID bags of words, row by row: a list of (word id, weight) for each cell.

    A cell that a shape covers holds its colour and its name, and "left", "above", "right", "below" as heavily as its
    sides lie far along their axis. Weights waver, as features do.
    """

    def word(text):
        [piece] = tokenizer.encode(text)
        return piece

    cells, most = [[(word("image"), 1.0)] for _ in range(GRID * GRID)], [0.1] * GRID * GRID
    for shape in scene.shapes:
        box_unit = FORMAT.unit_from_px(shape.box_px, scene.size)
        x1, y1, x2, y2 = (v * GRID for v in box_unit)
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            cover = max(0, min(x2, column + 1) - max(x1, column)) * max(0, min(y2, row + 1) - max(y1, row))
            if cover > most[cell]:
                most[cell] = cover
                cells[cell] = [(word(text), rng.uniform(0.6, 1.4)) for text in (shape.colour, shape.name)] + [
                    (word(text), 4 * (v - 0.5) + rng.gauss(0, 0.03))
                    for text, v in zip(("left", "above", "right", "below"), box_unit, strict=True)
                ]
    return cells


def side_questions(scene, rng):
    """App. E's questions about pairs of shapes; sometimes behind an example pair, as in-context learning has it."""
    unique = scene.unique()
    if len(unique) < 2:
        return []
    pairs = []
    for _ in range(3):
        a, b = rng.sample(unique, 2)
        for axis, side in zip(("across", "along"), side_of(b, a, scene), strict=True):
            if side:
                names = {"obj_1": f"the {a.name}", "obj_2": f"the {b.name}"}
                answer = SIDE_ANSWERS[side].format(**names)
                pairs.append((SIDE_PROMPTS[axis].format(**names), answer[0].upper() + answer[1:]))
    if len(pairs) > 2 and rng.random() < 0.2:
        question, answer = pairs[-1]
        pairs = [(" ".join(f"Q: {q} A: {a}" for q, a in pairs[:2]) + f" Q: {question}", answer)]
    return pairs


def located_questions(scene, rng):
    """The objectives of App. B about a scene, with names, phrases or descriptions."""
    pairs = []
    unique = scene.unique()
    for shape in scene.shapes:
        loc = FORMAT.encode_box(shape.box_px, scene.size)
        calls = [phrase(scene, shape), describe(scene, shape, rng)] + [shape.name] * 2 * (shape in unique)
        pairs.append((loc_question(rng.choice(calls), WORDING, rng), LOC_ANSWER.format(loc=loc)))
        if shape in unique:
            pairs.append((loc_question(shape.name, WORDING, rng), LOC_ANSWER.format(loc=loc)))
        pairs.append(
            (
                rng.choice(REV_PROMPTS).format(loc=loc),
                REV_ANSWER.format(category=rng.choice((shape.name, describe(scene, shape, rng)))),
            )
        )
    for name in rng.sample([n for n in NAMES if n not in {s.name for s in scene.shapes}], 2):
        called = rng.choice((name, f"{rng.choice(list(COLOURS))} {name}"))
        pairs.append((loc_question(called, WORDING, rng), NEG_ANSWER))
    return pairs


def drill(scene, rng):
    """Short, plain questions, where all that counts is what was asked for."""
    missing = rng.choice([n for n in NAMES if n not in {s.name for s in scene.shapes}])
    pairs = [(f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}.") for shape in scene.unique()]
    return pairs + presence(scene, rng) + [(loc_question(missing, WORDING, rng), NEG_ANSWER)]


def questions_about(scene, rng, count):
    located, sides, talk = located_questions(scene, rng), side_questions(scene, rng), converse(scene, rng)
    pairs = rng.sample(located, min(len(located), count // 2 + 1)) + rng.sample(sides, min(len(sides), 2)) + talk
    return pairs[:count]


def document(tokenizer, rng, form):
    """One packed row of a form that SCHEDULE names; "caption" is bags, and what stage 1 says of an image."""
    scene = draw_scene(rng)
    while not scene.unique():
        scene = draw_scene(rng)
    bos = [tokenizer.bos_token_id]
    if form == "retell":
        return retold(bos, [tokenizer.encode(text) for text in retell(scene, rng)], [])
    if form == "drill":
        pairs = drill(scene, rng)
    elif form in ("place", "name"):
        pairs = []
        for shape in rng.choices(scene.unique() if form == "place" else scene.shapes, k=4):
            loc = FORMAT.encode_box(shape.box_px, scene.size)
            pairs.append(
                (loc_question(shape.name, WORDING, rng), LOC_ANSWER.format(loc=loc))
                if form == "place"
                else (rng.choice(REV_PROMPTS).format(loc=loc), REV_ANSWER.format(category=shape.name))
            )
    else:
        pairs = questions_about(scene, rng, QUESTIONS)
    asked = [encode_segment(tokenizer, "v1", [pair]) for pair in pairs]
    chat = bos + tokenizer.encode(SYSTEM + " USER: ")
    if form == "told":
        return retold(chat, [tokenizer.encode(tell(scene, rng)) for _ in range(rng.randint(1, 3))], asked)
    before = bos if form == "caption" else chat
    segments = [encode_segment(tokenizer, "plain", [("", caption(scene, rng))])] if form == "caption" else asked
    row = pack(before + [0] * GRID * GRID, segments, 1024)
    row["bags"] = (len(before), bags(scene, tokenizer, rng))
    return row


def embed(llama, rows, input_ids):
    """Embed token ids (B, T), and each bag as the weighted sum of its words' embeddings: (B, T, D)."""
    places, words, weights = [], [], []
    for number, row in enumerate(rows):
        start, cells = row.get("bags", (0, []))
        for cell, bag in enumerate(cells):
            places += [number * input_ids.shape[1] + start + cell] * len(bag)
            words += [word for word, _ in bag]
            weights += [weight for _, weight in bag]
    x = llama.embed_tokens(input_ids)
    if not places:
        return x
    places = torch.tensor(places)
    flat = x.flatten(0, 1).index_fill(0, places.unique(), 0.0)
    sums = llama.embed_tokens(torch.tensor(words)) * torch.tensor(weights)[:, None]
    return flat.index_add(0, places, sums).view_as(x)


def retold(before, tellings, segments):
    """Pack several tellings of a scene as a prefix, with loss from the second on."""
    row = pack(before + [token for telling in tellings for token in telling], segments, 1024)
    start, end = len(before) + len(tellings[0]), len(before) + sum(map(len, tellings))
    row["labels"][start:end] = row["input_ids"][start:end]
    return row


# ----- tokenizer, training, gate


def make_tokenizer():
    """A sentencepiece BPE model with LLaMA's settings: digits apart, byte fallback, the same special ids."""
    rng = random.Random("tokenizer")

    def lines():
        for _ in range(6000):
            scene = draw_scene(rng)
            yield SYSTEM + " USER:"
            yield from (tell(scene, rng), caption(scene, rng))
            for question, answer in questions_about(scene, rng, 12):
                yield f"{question} ASSISTANT: {answer}"
            yield "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 -+.,:;!?'()[]"

    (HERE / "llama").mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_prefix=str(HERE / "llama" / "tokenizer"),
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        max_sentence_length=20000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (HERE / "llama" / "tokenizer.vocab").unlink()
    tokenizer = Tokenizer(HERE / "llama")
    return tokenizer


@torch.no_grad()
def gate(llama, tokenizer, form, scenes=150):
    """Ask held-out scenes: share of LocPred exact and acc@0.5, NegPred, RevLoc name, colour, yes/no, side.

    Answers are read off by forcing: right if every token of the true answer is the most likely one where it stands,
    except for acc@0.5, which takes the box of the most likely tokens.
    """
    rng = random.Random("llama held out")
    rows, checks = [], []
    before = [tokenizer.bos_token_id] + tokenizer.encode(SYSTEM + " USER: ")
    for _ in range(scenes):
        scene = next(s for s in iter(lambda: draw_scene(rng), None) if s.unique())
        shape = rng.choice(scene.unique())
        loc = FORMAT.encode_box(shape.box_px, scene.size)
        missing = rng.choice([n for n in NAMES if n not in {s.name for s in scene.shapes}])
        asked = [
            ("loc", loc_question(shape.name, WORDING, rng), LOC_ANSWER.format(loc=loc)),
            ("neg", loc_question(missing, WORDING, rng), NEG_ANSWER),
            ("rev", rng.choice(REV_PROMPTS).format(loc=loc), f"There is a {shape.name}"),
            ("colour", f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}"),
            ("yes", f"Is there {article(shape.name)} in the image?", "Yes"),
            ("no", f"Is there {article(missing)} in the image?", "No"),
        ]
        asked += [("side", question, answer) for question, answer in side_questions(scene, rng)[:1]]
        told = tokenizer.encode(tell(scene, rng)) if form == "told" else [0] * GRID * GRID
        segments = [encode_segment(tokenizer, "v1", [(question, answer)]) for _, question, answer in asked]
        rows.append(pack(before + told, [(ids[:-1], labels[:-1]) for ids, labels in segments], 1024))
        if form != "told":
            rows[-1]["bags"] = (len(before), bags(scene, tokenizer, rng))
        checks.append([(kind, shape, scene) for kind, _, _ in asked])
    hits = {}
    for row, kinds in zip(rows, checks, strict=True):
        batch = collate([row])
        hidden = llama.hidden(
            embed(llama, [row], batch["input_ids"]), batch["positions"], packed_mask(batch["segments"])
        )
        said = llama.lm_head(hidden)[0].argmax(-1)
        labels, segments = batch["labels"][0], batch["segments"][0]
        for number, (kind, shape, scene) in enumerate(kinds, start=1):
            where = ((segments == number) & (labels != IGNORE)).nonzero()[:, 0]
            hits.setdefault(kind, []).append(bool((said[where - 1] == labels[where]).all()))
            if kind == "loc":
                boxes = FORMAT.decode_boxes(tokenizer.decode(said[where - 1].tolist()), scene.size)
                hits.setdefault("loc acc@0.5", []).append(bool(boxes) and iou(boxes[0], shape.box_px) >= 0.5)
    return {kind: round(sum(h) / len(h), 3) for kind, h in sorted(hits.items())}


def save(llama):
    """Write the checkpoint in half precision."""
    folder = HERE / "llama"
    tensors = {(k if k.startswith("lm_head") else f"model.{k}"): v.half() for k, v in llama.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = {k: v for k, v in asdict(CONFIG).items() if v is not None}
    write_json(folder / "config.json", {**names, **special, **config})


def main():
    torch.manual_seed(0)
    keep_freed_memory()
    began = time.time()
    tokenizer = Tokenizer(HERE / "llama") if (HERE / "llama" / "tokenizer.model").exists() else make_tokenizer()
    llama = Llama(CONFIG)
    for name, p in llama.named_parameters():
        if p.ndim == 2:
            writes = "o_proj" in name or "down_proj" in name  # into the residual stream, twice a layer
            std = p.shape[1] ** -0.5 / (math.sqrt(2 * CONFIG.num_hidden_layers) if writes else 1)
            nn.init.normal_(p, std=0.2 if "embed" in name else std)
    nn.init.normal_(llama.lm_head.weight, std=0.02)
    print(f"{sum(p.numel() for p in llama.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} pieces", flush=True)
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [p for name, p in llama.named_parameters() if not (name.startswith("layers.") and p.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=LR_MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=LR_ADAMW, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    running = {}
    for step in range(STEPS):
        end = next(end for end in CYCLES if step < end)
        share = min(1, (step + 1) / 30, (end - step) / DECAY)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = LR_MUON * share, LR_ADAMW * share
        forms = next(forms for until, forms in SCHEDULE.items() if step < until)
        form = forms[step % len(forms)]
        rows = [document(tokenizer, random.Random(f"{step} {i}"), form) for i in range(BATCH * WEIGHT[form])]
        batch = collate(rows)
        x = embed(llama, rows, batch["input_ids"])
        loss = answer_loss(llama, x, batch["labels"], batch["segments"], batch["positions"])
        llama.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        muon.step()
        adamw.step()
        running[form] = 0.9 * running.get(form, loss.item()) + 0.1 * loss.item()
        if step % 25 == 24:
            losses = " ".join(f"{form} {value:.3f}" for form, value in running.items())
            print(f"step {step + 1} {losses} {time.time() - began:.0f} s", flush=True)
        if step % 500 == 499 or step == STEPS - 1:
            save(llama)
            for form in ("told", "bag"):
                print(f"gate {form}: {gate(llama, tokenizer, form)}", flush=True)


if __name__ == "__main__":
    main()
