"""Train the tiny LLaMA that replaces Vicuna, on text alone: `python -m tiny.make_llama` writes tiny/llama (HF format).

It learns the words of the shapes world, and to look things up in its context. A document is a scene in some form, then
questions about it in the chat format of stage 2, packed behind the shared scene as they are behind an image:

    copy    "small red circle at (12, 30, 50, 66). ..." three times, word for word or in another order, with loss from the
            second time on, when all can be copied. Training starts with this form alone: looking-up grows from it (LOG.md).
    text    the scene in sentences, up to three times in other order and wording, then questions
    bag     the scene as a grid of bags of words, one for each patch that a picture would have: several words at one position,
            their embeddings added with different weights. A visual token holds several facts at once, and a model this small
            must have met that before, unlike LLaMA-7B. Questions about everything; other forms of bags ask for one thing only:
            the caption ("caption"), colours and presence ("drill"), boxes by name ("place"), names by box ("name")

No picture is involved. The gate at the end asks about held-out scenes. (In llama.log, copy is "retell" and text is "told".)
"""

import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from torch import nn

import data
from coords import iou
from data import SYSTEM, USER, article, encode_segment, loc_question, pack
from formats.fast_cpu import keep_freed_memory
from formats.files import write_json
from formats.weights import write_tensors
from llama import Llama, Tokenizer
from model import VARIANTS, answer_loss, packed_mask
from tiny.shapes import COLOURS, NAMES, caption, converse, describe, draw_scene, phrase, presence, side_of

FOLDER = Path(__file__).parent / "llama"
CONFIG = VARIANTS["tiny"].text_config
FORMAT = VARIANTS["tiny"].coord_format()
GRID = FORMAT.grid
WORDING = data.Wording(FORMAT)
STEPS, BATCH, QUESTIONS = 6800, 8, 6
CYCLES, DECAY = (6050, STEPS), 600  # before each of these steps, learning rates fall to 0 over DECAY steps
LR_MUON, LR_ADAMW = 3e-3, 1.2e-3  # matrices of the blocks; embeddings, head and norms
WEIGHT = {"copy": 2, "text": 1, "caption": 4, "drill": 3, "bag": 2, "place": 3, "name": 3}  # documents, times BATCH
# The forms of documents, in turn, each tuple until that step. One easy skill at a time, and nothing else: copying, finding
# in text, naming the contents of bags, finding by name, finding by place. Then all of them together, because a skill that is
# not practised is forgotten. All of them from the start teach nothing (LOG.md).
SCHEDULE = {
    200: ("copy",),
    500: ("text", "text", "text", "copy"),
    620: ("caption",),
    750: ("drill",),
    1000: ("place",),
    1200: ("name",),
    5500: ("bag", "place", "name", "text", "caption", "drill"),
    6050: ("place", "text", "place", "bag", "place", "name", "place", "text", "place", "caption", "place", "drill"),
    STEPS: ("place", "place", "name", "place", "place", "bag", "place", "text"),
}


# ----- the parts of a document


def write_text(scene, rng):
    """Write a scene with coordinates once, in random order and wording."""
    form = rng.choice(("{a} at {loc}", "there is {a} at {loc}", "at {loc} there is {a}", "{p}: {loc}"))
    shapes = [(phrase(scene, s), location(scene, s)) for s in rng.sample(scene.shapes, len(scene.shapes))]
    return ". ".join(form.format(a=article(words), p=words, loc=loc) for words, loc in shapes) + "."


def write_copies(scene, rng):
    """Write a scene three times in one wording, half of the time word for word."""
    parts = [f"{phrase(scene, s)} at {location(scene, s)}" for s in scene.shapes]
    is_shuffled = rng.random() < 0.5
    return [". ".join(rng.sample(parts, len(parts)) if is_shuffled else parts) + "." for _ in range(3)]


def location(scene, shape):
    return FORMAT.encode_box(shape.box_px, scene.size)


def bags(scene, tokenizer, rng):
    """Return the scene as GRID x GRID bags of words, row by row: a list of (word id, weight) for each cell.

    The cell of a shape holds its colour and name, and "left", "above", "right", "below", weighted by the coordinates of the
    box's sides. All weights vary, as features do.
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
                sides = zip(("left", "above", "right", "below"), box_unit, strict=True)
                cells[cell] = [(word(text), rng.uniform(0.6, 1.4)) for text in (shape.colour, shape.name)]
                cells[cell] += [(word(text), 4 * (v - 0.5) + rng.gauss(0, 0.03)) for text, v in sides]
    return cells


def side_questions(scene, rng):
    """Ask App. E's questions about pairs of shapes, sometimes after two example pairs, as in-context learning does."""
    unique, pairs = scene.unique(), []
    for _ in range(3 if len(unique) > 1 else 0):
        a, b = rng.sample(unique, 2)
        for prompt, side in zip(data.SIDE_PROMPTS.values(), side_of(b, a, scene), strict=True):
            if side:
                names = {"obj_1": f"the {a.name}", "obj_2": f"the {b.name}"}
                answer = data.SIDE_ANSWERS[side].format(**names)
                pairs.append((prompt.format(**names), answer[0].upper() + answer[1:]))
    if len(pairs) > 2 and rng.random() < 0.2:
        question, answer = pairs[-1]
        pairs = [(" ".join(f"Q: {q} A: {a}" for q, a in pairs[:2]) + f" Q: {question}", answer)]
    return pairs


def ask_place(words, scene, shape, rng):
    return loc_question(words, WORDING, rng), data.LOC_ANSWER.format(loc=location(scene, shape))


def ask_absent(words, rng):
    return loc_question(words, WORDING, rng), data.NEG_ANSWER


def absent_names(scene):
    return [name for name in NAMES if name not in {shape.name for shape in scene.shapes}]


def located_questions(scene, rng):
    """Ask the questions of App. B about a scene, with names, phrases or descriptions."""
    pairs, unique = [], scene.unique()
    for shape in scene.shapes:
        calls = [phrase(scene, shape), describe(scene, shape, rng)] + [shape.name] * 2 * (shape in unique)
        pairs.append(ask_place(rng.choice(calls), scene, shape, rng))
        if shape in unique:
            pairs.append(ask_place(shape.name, scene, shape, rng))
        question = rng.choice(data.REV_PROMPTS).format(loc=location(scene, shape))
        pairs.append((question, data.REV_ANSWER.format(category=rng.choice((shape.name, describe(scene, shape, rng))))))
    for name in rng.sample(absent_names(scene), 2):
        pairs.append(ask_absent(rng.choice((name, f"{rng.choice(list(COLOURS))} {name}")), rng))
    return pairs


def drill(scene, rng):
    """Ask short, plain questions, whose answers depend on the asked-for shape alone."""
    absent = rng.choice(absent_names(scene))
    pairs = [(f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}.") for shape in scene.unique()]
    return pairs + presence(scene, rng) + [ask_absent(absent, rng)]


def questions_about(scene, rng, count):
    located, sides, talk = located_questions(scene, rng), side_questions(scene, rng), converse(scene, rng)
    pairs = rng.sample(located, min(len(located), count // 2 + 1)) + rng.sample(sides, min(len(sides), 2)) + talk
    return pairs[:count]


# ----- documents, and how they are embedded


def draw_unique(rng):
    """Draw a scene in which some name occurs once."""
    return next(scene for scene in iter(lambda: draw_scene(rng), None) if scene.unique())


def document(tokenizer, rng, form):
    """Draw one packed row of a form that SCHEDULE names."""
    scene, bos = draw_unique(rng), [tokenizer.bos_token_id]
    chat = bos + tokenizer.encode(f"{SYSTEM} {USER} ")
    if form == "copy":
        return pack_copies(bos, [tokenizer.encode(text) for text in write_copies(scene, rng)], [])
    if form == "drill":
        pairs = drill(scene, rng)
    elif form == "place":
        pairs = [ask_place(shape.name, scene, shape, rng) for shape in rng.choices(scene.unique(), k=4)]
    elif form == "name":
        pairs = [
            (rng.choice(data.REV_PROMPTS).format(loc=location(scene, shape)), data.REV_ANSWER.format(category=shape.name))
            for shape in rng.choices(scene.shapes, k=4)
        ]
    else:
        pairs = questions_about(scene, rng, QUESTIONS)
    segments = [encode_segment(tokenizer, "v1", [pair]) for pair in pairs]
    if form == "text":
        texts = [tokenizer.encode(write_text(scene, rng)) for _ in range(rng.randint(1, 3))]
        return pack_copies(chat, texts, segments)
    if form == "caption":  # what stage 1 says about an image
        chat, segments = bos, [encode_segment(tokenizer, "plain", [("", caption(scene, rng))])]
    return pack_bags(chat, bags(scene, tokenizer, rng), segments)


def pack_copies(before, texts, segments):
    """Pack several texts of a scene as a prefix, with loss from the second on."""
    row = pack(before + [token for text in texts for token in text], segments, CONFIG.max_position_embeddings)
    start, end = len(before) + len(texts[0]), len(before) + sum(map(len, texts))
    row["labels"][start:end] = row["input_ids"][start:end]
    return row


def pack_bags(before, cells, segments):
    """Pack a scene in bags as a prefix. Its tokens have id 0; `embed` replaces them."""
    row = pack(before + [0] * len(cells), segments, CONFIG.max_position_embeddings)
    return row | {"bags": (len(before), cells)}


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
    flat = x.flatten(0, 1).index_fill(0, places.unique(), 0.0)  # (B * T, D)
    sums = llama.embed_tokens(torch.tensor(words)) * torch.tensor(weights)[:, None]
    return flat.index_add(0, places, sums).view_as(x)


# ----- tokenizer, gate, training


def make_tokenizer(scenes=6000):
    """Train a sentencepiece BPE model with LLaMA's settings: single digits, byte fallback, the same special ids."""
    rng = random.Random("tokenizer")

    def lines():
        for _ in range(scenes):
            scene = draw_scene(rng)
            yield f"{SYSTEM} {USER}"
            yield from (write_text(scene, rng), caption(scene, rng))
            for question, answer in questions_about(scene, rng, 12):
                yield f"{question} {data.ASSISTANT} {answer}"
            yield "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 -+.,:;!?'()[]"

    FOLDER.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_prefix=str(FOLDER / "tokenizer"), model_type="bpe", vocab_size=CONFIG.vocab_size,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, max_sentence_length=20000, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    (FOLDER / "tokenizer.vocab").unlink()
    return Tokenizer(FOLDER)


def gate_row(tokenizer, rng, form):
    """Draw one held-out scene: (packed row, [(kind, shape, scene) of each question])."""
    scene = draw_unique(rng)
    shape = rng.choice(scene.unique())
    absent = rng.choice(absent_names(scene))
    questions = [
        ("loc", *ask_place(shape.name, scene, shape, rng)),
        ("neg", *ask_absent(absent, rng)),
        ("rev", rng.choice(data.REV_PROMPTS).format(loc=location(scene, shape)), f"There is a {shape.name}"),
        ("colour", f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}"),
        ("yes", f"Is there {article(shape.name)} in the image?", "Yes"),
        ("no", f"Is there {article(absent)} in the image?", "No"),
    ]
    questions += [("side", question, answer) for question, answer in side_questions(scene, rng)[:1]]
    before = [tokenizer.bos_token_id] + tokenizer.encode(f"{SYSTEM} {USER} ")
    text = tokenizer.encode(write_text(scene, rng)) if form == "text" else []
    segments = [encode_segment(tokenizer, "v1", [pair]) for _, *pair in questions]
    segments = [(ids[:-1], labels[:-1]) for ids, labels in segments]  # without the end token
    if form == "text":
        row = pack(before + text, segments, CONFIG.max_position_embeddings)
    else:
        row = pack_bags(before, bags(scene, tokenizer, rng), segments)
    return row, [(kind, shape, scene) for kind, *_ in questions]


@torch.no_grad()
def gate(llama, tokenizer, form, scenes=150):
    """Ask about held-out scenes: {kind of question: share answered right}, for LocPred also acc@0.5.

    Answers are teacher-forced: right if every token of the true answer is the most likely one at its place. acc@0.5 takes the
    box of the most likely tokens.
    """
    rng, hits = random.Random("llama held out"), {}
    for row, questions in [gate_row(tokenizer, rng, form) for _ in range(scenes)]:
        batch = data.collate([row])
        x = embed(llama, [row], batch["input_ids"])
        hidden = llama.hidden(x, batch["positions"], packed_mask(batch["segments"]))
        _, columns, targets = batch["answers"]
        predicted = llama.lm_head(hidden)[0, columns].argmax(-1)  # (N,): the most likely tokens of all answers
        of_token = torch.tensor([s for s, label in zip(row["segments"], row["labels"], strict=True) if label != data.IGNORE])
        for number, (kind, shape, scene) in enumerate(questions, start=1):
            mine = of_token == number
            hits.setdefault(kind, []).append(bool((predicted[mine] == targets[mine]).all()))
            if kind == "loc":
                boxes = FORMAT.decode_boxes(tokenizer.decode(predicted[mine].tolist()), scene.size)
                hits.setdefault("loc acc@0.5", []).append(bool(boxes) and iou(boxes[0], shape.box_px) >= 0.5)
    return {kind: round(sum(h) / len(h), 3) for kind, h in sorted(hits.items())}


def save(llama):
    """Write the checkpoint in half precision."""
    tensors = {(k if k.startswith("lm_head") else f"model.{k}"): v.half() for k, v in llama.state_dict().items()}
    write_tensors(FOLDER / "model.safetensors", tensors)
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = {k: v for k, v in asdict(CONFIG).items() if v is not None}
    write_json(FOLDER / "config.json", {**names, **special, **config})


def initialise(llama):
    for name, p in llama.named_parameters():
        if p.ndim == 2:
            is_last = "o_proj" in name or "down_proj" in name  # adds to the residual stream, twice a layer
            std = p.shape[1] ** -0.5 / (math.sqrt(2 * CONFIG.num_hidden_layers) if is_last else 1)
            nn.init.normal_(p, std=0.2 if "embed" in name else std)
    nn.init.normal_(llama.lm_head.weight, std=0.02)


def main():
    torch.manual_seed(0)
    keep_freed_memory()
    began, running = time.time(), {}
    tokenizer = Tokenizer(FOLDER) if (FOLDER / "tokenizer.model").exists() else make_tokenizer()
    llama = Llama(CONFIG)
    initialise(llama)
    print(f"{sum(p.numel() for p in llama.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} pieces", flush=True)
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [p for name, p in llama.named_parameters() if not (name.startswith("layers.") and p.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=LR_MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=LR_ADAMW, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    for step in range(STEPS):
        end = next(end for end in CYCLES if step < end)
        share = min(1, (step + 1) / 30, (end - step) / DECAY)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = LR_MUON * share, LR_ADAMW * share
        forms = next(forms for until, forms in SCHEDULE.items() if step < until)
        form = forms[step % len(forms)]
        rows = [document(tokenizer, random.Random(f"{step} {i}"), form) for i in range(BATCH * WEIGHT[form])]
        batch = data.collate(rows)
        x = embed(llama, rows, batch["input_ids"])  # (B, T, D)
        loss = answer_loss(llama, x, batch["answers"], batch["positions"], batch["segments"])
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
            for form in ("text", "bag"):
                print(f"gate {form}: {gate(llama, tokenizer, form)}", flush=True)


if __name__ == "__main__":
    main()
