"""Train the tiny LLaMA that replaces Vicuna, on text alone: `python -m tiny.make_llama` writes tiny/llama (HF format).

It learns the words of the shapes world, and to look things up in its context. A document is a scene in some form, then
questions about it in the chat format of stage 2, packed after the shared scene as they are after an image:

    copy    "small red circle at (12, 30, 50, 66). ..." three times, word for word or in another order, with loss from the
            second time on, when all can be copied. Training starts with this form alone: looking-up grows from it (LOG.md)
    text    the scene in sentences, up to three times in other order and wording, then questions
    bag     a grid of bags of words, one for each patch of a picture: several words at one position, their weighted embeddings
            added. A visual token holds several facts at once, and a model this small must have met that before.
    caption, drill, place, name, colour, side    bags, then a caption (caption) or questions of one kind: colours and presence
            (drill), box by name (place), name by box (name), colours and the number (colour), colours and sides (side)

Two shorter trainings follow, in which bags come without questions about yes and no. They have errors, as the tower's features
do, and LLaMA learns which of them to trust. In the last one, the six ways to write places, boxes or points in one of three
representations, share the rows; two words before the scene name the way. In llama.log: gate (exam), retell (copy), told (text).
"""

import math
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch

import data
from coords import KINDS
from data import Object, article, ask_loc, ask_neg, ask_rev, encode_segment
from formats.fast_cpu import keep_freed_memory
from formats.files import read_json, run_command
from llama import Llama, Tokenizer
from model import VARIANTS, answer_loss, packed_mask
from tiny.make_vision import save, update
from tiny.shapes import COLOURS, NUMBERS, draw_scene

FOLDER = Path(__file__).parent / "llama"
CONFIG, FORMAT = VARIANTS["tiny"].text_config, VARIANTS["tiny"].coord_format()
GRID, WORDING = FORMAT.representation.grid, data.Wording(FORMAT)  # data.ask_* take a scene as record, and a shape as object
FORMATS = {kind: replace(VARIANTS["tiny"], kind=kind).coord_format() for kind in KINDS}
WAYS = {f" {kind} {location}": data.Wording(FORMATS[kind], location=location) for kind in KINDS for location in data.LOCATIONS}
STEPS, BATCH, QUESTIONS = 6800, 8, 6
# {form: its documents in a step / BATCH}; {step: the forms that come in turn until then}; plans of the second, third training
# (share: of the learning rates); options of sentencepiece; keys of config.json. One easy skill at a time, and nothing else;
# then all of them together, because a skill that is not practised is forgotten. All from the start teach nothing (LOG.md).
WEIGHT, SCHEDULE, AGAIN, IN_ALL_WAYS, TOKENIZER, HF_CONFIG = read_json(Path(__file__).with_suffix(".json")).values()
# Standard deviations of the sides in bags, in fractions of the image: of the part that all cells of a shape share, of the rest,
# and how much that grows towards a cell that the shape hardly covers. Of linear regression on an earlier tower's patches (off
# by 1.5 % inside, up to 4 % at an edge), then on today's (0.6 and 1.4 %)
EXACT, EARLIER, TODAY = (0, 0.0075, 0), (0.01, 0.012, 0.03), (0.004, 0.0045, 0.01)
CYCLES, DECAY = (6050, STEPS), 600  # before each of these steps, learning rates fall to 0 over DECAY steps
LR_MUON, LR_ADAMW = 3e-3, 1.2e-3  # matrices of the blocks; embeddings, head and norms


def bags(scene, tokenizer, rng, errors=EXACT):
    """Write a scene as GRID x GRID bags of words, row by row: (cell, word id, weight) of each word. The cell of a shape holds
    its colour, its name, and the sides of its box, weighted by their coordinates. All weights vary, as features do. errors:
    EXACT, EARLIER, or TODAY (times 0.5 to 2, drawn for the scene); but for EXACT, colour and name are weaker at an edge"""
    cells, most = [[("image", 1.0)] for _ in range(GRID * GRID)], [0.1] * GRID * GRID
    scale = rng.uniform(0.5, 2) if errors is TODAY else 1
    in_common, rest, at_edge = (scale * std for std in errors)
    for shape in scene.shapes:
        box_unit = FORMAT.unit_from_px(shape.box_px, scene.size)
        x1, y1, x2, y2 = (v * GRID for v in box_unit)
        shared = [rng.gauss(0, in_common) if in_common else 0.0 for _ in box_unit]
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            cover = max(0, min(x2, column + 1) - max(x1, column)) * max(0, min(y2, row + 1) - max(y1, row))
            if cover > most[cell]:
                most[cell], sides = cover, zip(("left", "above", "right", "below"), box_unit, shared, strict=True)
                strength = 1 if errors is EXACT else 0.4 + 0.6 * cover
                error = rest + at_edge * (1 - cover) ** 2
                cells[cell] = [(word, strength * rng.uniform(0.6, 1.4)) for word in (shape.colour, shape.name)]
                cells[cell] += [(word, 4 * (v - 0.5 + off + rng.gauss(0, error))) for word, v, off in sides]
    return [(cell, *tokenizer.encode(word), weight) for cell, bag in enumerate(cells) for word, weight in bag]  # one id a word


def side_questions(scene, rng):
    """Ask App. E's questions about pairs of shapes, sometimes after two example pairs, as in-context learning does."""
    pairs = [pair for _ in range(3 if len(scene.unique()) > 1 else 0) for pair in scene.ask_sides(rng)]
    if len(pairs) > 2 and rng.random() < 0.2:
        examples, (question, answer) = " ".join(f"Q: {q} A: {a}" for q, a in pairs[:2]), pairs[-1]
        return [(f"{examples} Q: {question}", answer)]
    return pairs


def questions_about(scene, rng, count, wording=WORDING, has_sides=True):
    """Ask the questions of App. B, with names, phrases or descriptions, then those of App. E and of conversations."""
    located, unique = [], scene.unique()
    for shape in scene.shapes:
        calls = [scene.phrase(shape), scene.describe(shape, rng)] + [shape.name] * 2 * (shape in unique)
        located.append(ask_loc(Object(rng.choice(calls), shape.box_px), scene, wording, rng))
        if shape in unique:
            located.append(ask_loc(shape, scene, wording, rng))
        question, words = ask_rev(shape, scene, wording, rng)[0], rng.choice((shape.name, scene.describe(shape, rng)))
        located.append((question, data.REV_ANSWER.format(category=words)))
    for name in rng.sample(scene.absent(), 2):
        words = rng.choice((name, f"{rng.choice(list(COLOURS))} {name}"))
        located.append(ask_neg(Object(words, None), scene, wording, rng))
    sides, talk = side_questions(scene, rng) if has_sides else [], [(question, answer) for question, answer, _ in scene.quiz(rng)]
    return (rng.sample(located, min(len(located), count // 2 + 1)) + rng.sample(sides, min(len(sides), 2)) + talk)[:count]


def draw_unique(rng):
    """Draw a scene in which some name occurs once."""
    return next(scene for scene in iter(lambda: draw_scene(rng), None) if scene.unique())


def document(tokenizer, rng, form, errors=EXACT, way=""):
    """Draw one packed row of a form that SCHEDULE, AGAIN or IN_ALL_WAYS names. way: a key of WAYS"""
    scene, pairs, texts, wording = draw_unique(rng), [], [], WAYS[way] if way else WORDING
    if form == "copy":
        parts = [f"{scene.phrase(shape)} at {wording.place(shape.box_px, scene.size)}" for shape in scene.shapes]
        is_shuffled = rng.random() < 0.5
        texts = [". ".join(rng.sample(parts, len(parts)) if is_shuffled else parts) + "." for _ in range(3)]
    elif form in ("drill", "colour", "side"):  # short, plain questions; answers to most depend on one shape alone
        pairs = [(f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}.") for shape in scene.unique()]
        if form == "drill":
            absent = Object(rng.choice(scene.absent()), None)
            pairs += scene.presence(rng) + [ask_neg(absent, scene, wording, rng)]
        elif form == "side":
            pairs += side_questions(scene, rng)
        elif rng.random() < 0.3:
            pairs.append(("How many shapes are there?", f"There are {NUMBERS[len(scene.shapes)]} shapes."))
    elif form in ("place", "name"):
        ask, shapes = (ask_loc, scene.unique()) if form == "place" else (ask_rev, scene.shapes)
        pairs = [ask(shape, scene, wording, rng) for shape in rng.choices(shapes, k=4)]
    else:
        pairs = questions_about(scene, rng, QUESTIONS, wording, has_sides=not way)
    if form == "caption":  # what stage 1 says about an image
        pairs = [("", scene.caption(rng))]
    if form == "text":
        texts = [scene.tell(wording, rng) for _ in range(rng.randint(1, 3))]
    template = "plain" if form in ("copy", "caption") else "v1"
    way = way if form in ("text", "place", "name") else ""  # only these write places
    return pack_scene(scene, tokenizer, rng, pairs, texts, template, errors=errors, way=way)


def pack_scene(scene, tokenizer, rng, pairs, texts=(), template="v1", *, errors=EXACT, way="", stop=None):
    """Pack a scene, and questions after it: the scene as texts, with loss from the second on, or if there are none, in bags.
    The row has one more entry, "bags": (column, word id, weight) of each word in them. `embed` replaces the ids there, 0."""
    before = data.encode_prefix(tokenizer, template, 1)[:-1] + tokenizer.encode(way)  # without the placeholder of an image
    texts = [tokenizer.encode(text) for text in texts]
    segments = [[part[:stop] for part in encode_segment(tokenizer, template, [pair])] for pair in pairs]
    row = data.pack(before + (sum(texts, []) or [0] * GRID * GRID), segments, CONFIG.max_position_embeddings)
    start, end = (len(before) + sum(map(len, part)) for part in (texts[:1], texts))
    row["labels"][start:end] = row["input_ids"][start:end]
    words = [] if texts else bags(scene, tokenizer, rng, errors)
    return row | {"bags": [(len(before) + cell, word, weight) for cell, word, weight in words]}


def embed(llama, rows, input_ids):
    """Embed token ids (B, T), and each bag as the weighted sum of its words' embeddings: (B, T, D)."""
    x, length = llama.embed_tokens(input_ids), input_ids.shape[1]
    words = [(number * length + column, *word) for number, row in enumerate(rows) for column, *word in row["bags"]]
    if not words:
        return x
    places, words, weights = map(torch.tensor, zip(*words, strict=True))
    flat = x.flatten(0, 1).index_fill(0, places.unique(), 0.0)  # (B * T, D)
    return flat.index_add(0, places, llama.embed_tokens(words) * weights[:, None]).view_as(x)


def make_tokenizer(scenes=6000):
    """Train a sentencepiece BPE model with LLaMA's settings: single digits, byte fallback, the same special ids."""
    rng, lines = random.Random("tokenizer"), []
    for _ in range(scenes):
        scene = draw_scene(rng)
        lines += [f"{data.SYSTEM} {data.USER}", scene.tell(WORDING, rng), scene.caption(rng)]
        lines += [f"{question} {data.ASSISTANT} {answer}" for question, answer in questions_about(scene, rng, 12)]
        lines.append("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 -+.,:;!?'()[]")
    FOLDER.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(FOLDER / "tokenizer"), vocab_size=CONFIG.vocab_size, **TOKENIZER
    )
    (FOLDER / "tokenizer.vocab").unlink()
    return Tokenizer(FOLDER)


@torch.no_grad()
def exam(llama, tokenizer, form, scenes=150, errors=EXACT, way=""):
    """Ask about held-out scenes: {kind of question: share answered right}, of LocPred also acc@0.5 and mean IoU of its boxes, or
    the share of its points in their box. Answers are teacher-forced: right if each token is the most likely one at its place."""
    rng, hits, wording = random.Random("llama held out"), defaultdict(list), WAYS[way] if way else WORDING
    for _ in range(scenes):
        scene = draw_unique(rng)
        shape, absent = rng.choice(scene.unique()), rng.choice(scene.absent())
        questions = {
            "loc": ask_loc(shape, scene, wording, rng), "neg": ask_neg(Object(absent, None), scene, wording, rng),
            "rev": (ask_rev(shape, scene, wording, rng)[0], f"There is a {shape.name}"),
            "colour": (f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}"),
            "yes": (f"Is there {article(shape.name)} in the image?", "Yes"),
            "no": (f"Is there {article(absent)} in the image?", "No"),
        } | dict(zip(["side"], side_questions(scene, rng), strict=False))  # fmt: skip
        texts = [scene.tell(wording, rng)] if form == "text" else []
        row = pack_scene(scene, tokenizer, rng, questions.values(), texts, errors=errors, way=way, stop=-1)  # no end tokens
        batch = data.collate([row])
        x, (_, columns, truth) = embed(llama, [row], batch["input_ids"]), batch["targets"]
        hidden = llama.hidden(x, batch["positions"], packed_mask(batch["segment_of"]))
        guess = llama.lm_head(hidden)[0, columns].argmax(-1)  # (N,): the most likely tokens of all answers
        number = torch.tensor(row["segment_of"])[torch.tensor(row["labels"]) != data.IGNORE]  # (N,): the question of each token
        for i, kind in enumerate(questions, start=1):
            hits[kind].append(bool((guess == truth)[number == i].all()))
        answer = tokenizer.decode(guess[number == 1].tolist())
        located = SimpleNamespace(answer=answer, size=scene.size, truth={"box_px": shape.box_px}, measured={})
        data.judge_loc(located, wording)
        hits["loc acc@0.5, or in the box"].append(located.correct)
        hits["loc mean IoU"].append(located.measured.get("iou", math.nan))
    return {kind: round(sum(h) / len(h), 3) for kind, h in sorted(hits.items())}


def new_llama():
    llama = Llama(CONFIG)
    for name, p in llama.named_parameters():
        if p.ndim == 2:
            is_last = "o_proj" in name or "down_proj" in name  # adds to the residual stream, twice a layer
            std = p.shape[1] ** -0.5 / (math.sqrt(2 * CONFIG.num_hidden_layers) if is_last else 1)
            torch.nn.init.normal_(p, std=0.2 if "embed" in name else std)
    torch.nn.init.normal_(llama.lm_head.weight, std=0.02)
    return llama


def learn(llama, tokenizer, steps, draw):
    """Take so many steps. draw: step -> (form, rows, share of the learning rates)."""
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [p for name, p in llama.named_parameters() if not (name.startswith("layers.") and p.ndim == 2)]
    torch.Tensor.bfloat16 = torch.Tensor.float  # Muon computes in it: on a CPU 3 s a step for these matrices, in float32 0.1 s
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        form, rows, share = draw(step)
        batch = data.collate(rows)
        x = embed(llama, rows, batch["input_ids"])  # (B, T, D)
        loss = answer_loss(llama, x, batch["targets"], batch["positions"], batch["segment_of"])
        update(loss, {muon: LR_MUON * share, adamw: LR_ADAMW * share}, llama.parameters())
        if step % 25 == 24:  # the forms come in turns of another length
            print(f"step {step + 1} {form} {loss:.3f}", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save(FOLDER, llama, "model.", **HF_CONFIG)
            for form in ("text", "bag"):
                print(f"exam {form}: {exam(llama, tokenizer, form)}", flush=True)


def draw_later(tokenizer, plan, errors, ways, step):
    """Draw a step of the second or third training, its rows in each of `ways` in turn: (form, rows, share of the learning rates)."""
    form, steps = plan["forms"][step % len(plan["forms"])], plan["steps"]
    seeds = [random.Random(f"{plan['seed']} {step} {i}") for i in range(plan["rows"][form])]
    rows = [document(tokenizer, rng, form, errors, ways[(step + i) % len(ways)]) for i, rng in enumerate(seeds)]
    return form, rows, plan["share"] * min(1, (step + 1) / 30, (steps - step) / (0.7 * steps))


def main():
    torch.manual_seed(0)
    keep_freed_memory()
    tokenizer = Tokenizer(FOLDER) if (FOLDER / "tokenizer.model").exists() else make_tokenizer()

    def first(step):
        end = next(end for end in CYCLES if step < end)
        forms = next(forms for until, forms in SCHEDULE.items() if step < int(until))
        form = forms[step % len(forms)]
        rows = [document(tokenizer, random.Random(f"{step} {i}"), form) for i in range(BATCH * WEIGHT[form])]
        return form, rows, min(1, (step + 1) / 30, (end - step) / DECAY)

    learn(new_llama(), tokenizer, STEPS, first)
    for plan, errors, ways in (AGAIN, EARLIER, [""]), (IN_ALL_WAYS, TODAY, [*WAYS]):
        llama = Llama.from_pretrained(FOLDER).float().requires_grad_()  # the files hold half precision
        learn(llama, tokenizer, plan["steps"], partial(draw_later, tokenizer, plan, errors, ways))
    for way in WAYS:
        print(f"exam{way}: {exam(Llama.from_pretrained(FOLDER).float(), tokenizer, 'bag', errors=TODAY, way=way)}")


if __name__ == "__main__":
    run_command("tiny.make_llama", main)
