"""From an annotated image to token ids and labels (Sec. 3.3, App. B).

    annotation files --annotations.read_file--> Records --Examples--> packed rows --collate--> a batch

A `Record` holds what the files say about an image or a clip: objects with box_px, absent categories, captions, conversations.
Text is written only when an example is drawn, so the representation, the objectives and the wording are options of a run.
A row holds the image once and k question/answer segments after it (loss is on the tokens between « and »):

    <s> A chat between ... questions. USER: <image>     the prefix, which all segments share
      \\n Localize the object described cup in terms of (x1,y1,x2,y2) bbox? ASSISTANT: «It is located at (4, 52, 13, 63)</s>»
      \\n What is at location (60, 2, 90, 41) in image? ASSISTANT: «There is a dog.</s>»

A segment sees the prefix and itself, no other segment (`model.packed_mask`). A packed row teaches what k rows would teach, and
the image is read once. `python -m tools.show` prints such rows.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from clip_vit import open_image, preprocess
from coords import CoordFormat, iou

IMAGE_ID = -200  # placeholder id, one per visual token (LLaVA's choice: no vocabulary has it)
IGNORE = -100  # label of a token without loss

# ----- templates

# Vicuna v1's chat: SYSTEM, then "USER: question ASSISTANT: answer</s>" for each turn
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER, ASSISTANT = "USER:", "ASSISTANT:"

# App. B of the paper, to the letter: "the the" is theirs
LOC_PROMPTS = (
    "Where is the object described {category} located in image in terms of {repr}?",
    "What is the location of object described {category} in terms of {repr}?",
    "Localize the object described {category} in terms of {repr}?",
    "Provide a {repr} for the the object described {category}?",
    "Generate a {repr} for the the object described {category}?",
)
REV_PROMPTS = (
    "Describe the object located at {loc}?",
    "Provide a caption for object at {loc}?",
    "What is at location {loc} in image?",
)
LOCATIONS = {"box": "(x1,y1,x2,y2) bbox", "point": "(cx,cy) point"}  # what a location is; fills {repr} above
WORDS = ("name", "description", "mixed")  # what names an object; mixed: half and half
LOC_ANSWER = "It is located at {loc}"
NEG_ANSWER = "There is no such object in the image"
REV_ANSWER = "There is a {category}."
# App. E words left and right; the question and answers about above and below are ours
SIDE_PROMPTS = {
    "left/right": "Which side of {obj_1} is {obj_2} located?",
    "above/below": "Is {obj_2} located above or below {obj_1}?",
}
SIDE_ANSWERS = {
    "left": "{obj_2} is located to the left of {obj_1}.",
    "right": "{obj_2} is located to the right of {obj_1}.",
    "above": "{obj_2} is located above {obj_1}.",
    "below": "{obj_2} is located below {obj_1}.",
}


def article(words):
    """Put "a" or "an" before a noun, by its first letter: 'a dog', 'an orange'."""
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


# ----- records


@dataclass(frozen=True)
class Object:
    """One annotated object. `description` is a pseudo-caption such as "{name} that is ...", or None.

    An absent object, which NegPred asks for, has box_px None; its description is borrowed from another image.
    """

    name: str
    box_px: tuple | None
    description: str | None = None


@dataclass(frozen=True)
class Record:
    """What is known about one image or clip. Boxes are in its own pixels. A text-only conversation has image None."""

    id: str
    image: Path | None
    size: tuple  # (width, height); (0, 0) if no file says it
    objects: tuple = ()  # objects whose category occurs once: the paper's unique-instance filter (Sec. 3.3)
    present: tuple = ()  # every category annotated in the image
    absent: tuple = ()  # every other category of the data set
    captions: tuple = ()
    conversations: tuple = ()  # each a tuple of (question, answer) turns
    weight: float = 1.0  # how often an epoch draws it
    is_clip: bool = False


def unique_objects(boxes):
    """Return the Objects whose category an image has once: the paper's unique-instance filter (Sec. 3.3).

    boxes: `formats.schema.Box` of one image. A crowd or an invalid box counts as an occurrence, and is not asked for.
    """
    count = Counter(box.name for box in boxes)
    return tuple(Object(b.name, b.box_px, b.description) for b in boxes if b.box_px and count[b.name] == 1)


# ----- objectives: questions, answers, and when an answer is right


@dataclass(frozen=True)
class Wording:
    """How questions and answers are written: options of a run, not properties of the data."""

    fmt: CoordFormat
    objectives: tuple = ("loc", "neg", "rev")  # keys of OBJECTIVES
    location: str = "box"  # or "point"
    words: str = "name"  # one of WORDS
    neg_ratio: float = 1.0  # absent objects asked for, per object that is present
    medium: str = "image"  # or "video": what evaluate.ask_presence calls a clip

    def __post_init__(self):
        for name, choices in ("location", LOCATIONS), ("words", WORDS):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {tuple(choices)}")

    def place(self, box_px, size):
        """Write a location as text: the box, or its centre."""
        if self.location == "box":
            return self.fmt.encode_box(box_px, size)
        x1, y1, x2, y2 = box_px
        return self.fmt.encode_point(((x1 + x2) / 2, (y1 + y2) / 2), size)

    def can_place(self, box_px, size):
        """Return True if the model's square shows enough of a box to ask for it: half of it, and its centre.

        A box within a pixel of the corner cannot be placed: `CoordFormat` would take its numbers for fractions.
        """
        x1, y1, x2, y2 = box_px
        centre_px = (x1 + x2) / 2, (y1 + y2) / 2
        if max(box_px if self.location == "box" else centre_px) <= 1 < min(size):
            return False
        centre_unit = self.fmt.unit_from_px(centre_px, size)
        return self.fmt.visible(box_px, size) >= 0.5 and all(0 <= v <= 1 for v in centre_unit)

    def words_for(self, o, rng):
        """Choose the words for an object: its category or its description."""
        if self.words == "name" or o.description is None or (self.words == "mixed" and rng.random() < 0.5):
            return o.name
        return o.description


@dataclass(frozen=True)
class Objective:
    """An instruction objective: a task of evaluate.py, rows of tools.prefcoco, and with --objectives a part of training.

    task     its name in evaluate.py
    about    what a question is about: "object" (each unique one), "pair" (two of them), "absent" (a category not in the image)
    ask      (target, record, wording, rng) -> (question, answer); the target is an Object, or two for a pair
    judge    (item, wording): sets item.correct, item.boxes_px if the answer holds a location, and what else it found in
             item.measured. It reads item.answer, item.size and item.truth, which has the keys "answer" (the expected one) and
             "name", about an object "box_px", about a pair "names" (for judge_rev: all categories); see evaluate.Item
    prompts  its question templates, noted in the results
    """

    task: str
    about: str
    ask: Callable
    judge: Callable
    prompts: tuple = ()

    def __post_init__(self):
        if self.about not in ("object", "pair", "absent"):
            raise ValueError(f"an objective about {self.about!r}; choose object, pair or absent")


def loc_question(words, wording, rng):
    return rng.choice(LOC_PROMPTS).format(category=words, repr=LOCATIONS[wording.location])


def ask_loc(o, record, wording, rng):
    """LocPred: where is this object?"""
    question = loc_question(wording.words_for(o, rng), wording, rng)
    return question, LOC_ANSWER.format(loc=wording.place(o.box_px, record.size))


def first_location(item, wording):
    """Return the first location in an answer, as a list of at most one box_px. A point becomes a box of 2 px each way."""
    if wording.location == "box":
        return wording.fmt.decode_boxes(item.answer, item.size)[:1]
    points_px = wording.fmt.decode_points(item.answer, item.size)[:1]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in points_px]


def judge_loc(item, wording):
    """Right if the first box reaches IoU 0.5 with the true one; a point, if it lies in the true box."""
    item.boxes_px = first_location(item, wording)
    if wording.location == "point":
        x1, y1, x2, y2 = item.truth["box_px"]
        points_px = wording.fmt.decode_points(item.answer, item.size)[:1]
        item.correct = any(x1 <= x <= x2 and y1 <= y <= y2 for x, y in points_px)
    else:
        item.measured["iou"] = iou(item.boxes_px[0], item.truth["box_px"]) if item.boxes_px else 0.0
        item.correct = item.measured["iou"] >= 0.5


def ask_neg(o, record, wording, rng):
    """NegPred: where is this object, which is not in the image?"""
    return loc_question(o.description or o.name, wording, rng), NEG_ANSWER


def judge_neg(item, wording):
    """Right if the answer says that there is no such object."""
    item.boxes_px = first_location(item, wording)
    item.correct = "no such object" in item.answer.lower()


def ask_rev(o, record, wording, rng):
    """RevLoc: what is at this location?"""
    question = rng.choice(REV_PROMPTS).format(loc=wording.place(o.box_px, record.size))
    return question, REV_ANSWER.format(category=wording.words_for(o, rng))


BABY = r"baby(?! (?:elephant|giraffe|zebra|bear|cow|sheep|horse|bird|cat|dog)s?\b)"  # a baby elephant is no person
KINDS_OF_PEOPLE = rf"man|woman|boy|girl|child|kid|{BABY}|lady|guy|player|rider|skier|surfer|skateboarder|snowboarder"
PEOPLE = rf"(?:people|men|women|children|babies|ladies|(?:{KINDS_OF_PEOPLE})s?)"


@cache
def name_pattern(name):
    """Return a pattern for a category in a text: its name, its plural, and for person what captions call people."""
    plural = re.sub("mouse$", "mice", re.sub("fe$", "ves", re.sub("(?<![aeiou])y$", "ies", name)))  # unchanged, if regular
    names = rf"(?:{re.escape(name)}(?:s|(?:(?<=[sxzo])|(?<=[cs]h))es)?|{re.escape(plural)})"
    if name.lower() == "person":  # a man's tie, or boys', is no person
        names = rf"(?:{names}|{PEOPLE})(?!['’]s\b|(?<=s)['’])"
    return re.compile(rf"(?i:(?<!\w){names}(?!\w))")


def first_named(text, names):
    """Return the category that a text names first (the longest, if several start there), or None.

    >>> first_named("There is a wine glass on the table", ["glass", "table", "wine glass"])
    'wine glass'
    """
    found = {name: match for name in names if (match := name_pattern(name).search(text))}
    # the earliest match, then the longest; if two categories match the same words, the one spelled like them, else the longer
    return min(found, key=lambda n: ((m := found[n]).start(), -m.end(), m[0].lower() != n.lower(), -len(n), n), default=None)


def judge_rev(item, wording):
    """Right if the first category that the answer names is the true one."""
    item.measured["named"] = first_named(item.answer, item.truth["names"])
    item.correct = item.measured["named"] == item.truth["name"]


def judge_named(item, wording):
    """Right if, of the pair's names, the answer mentions the expected one first. For objectives of your own about pairs."""
    named, expected = (first_named(text, item.truth["names"]) for text in (item.answer, item.truth["answer"]))
    item.correct = named is not None and named == expected


OBJECTIVES = {
    "loc": Objective("locpred", "object", ask_loc, judge_loc, LOC_PROMPTS),
    "neg": Objective("negpred", "absent", ask_neg, judge_neg, LOC_PROMPTS),
    "rev": Objective("revloc", "object", ask_rev, judge_rev, REV_PROMPTS),
}


def targets_of(record, about, wording, rng):
    """List what can be asked about in a record: its unique objects that the model's square shows, or pairs of them."""
    objects = [o for o in record.objects if wording.can_place(o.box_px, record.size)]
    if about == "pair":
        objects = rng.sample(objects, len(objects))
        return list(zip(objects[0::2], objects[1::2], strict=False))
    return objects


def draw_absent(record, wording, rng, descriptions, at_least=0):
    """Yield absent objects to ask for, neg_ratio per unique object; half borrow a description, unless words are names."""
    wanted = wording.neg_ratio * max(1, len(targets_of(record, "object", wording, rng)))
    count = min(int(wanted) + (rng.random() < wanted % 1), len(record.absent))
    count = max(count, at_least * (wanted > 0))
    for name in rng.sample(record.absent, count):
        borrowed = rng.choice(descriptions[name]) if descriptions.get(name) else None
        is_described = borrowed and wording.words != "name" and rng.random() < 0.5
        yield Object(name, None, borrowed if is_described else None)


def draw_questions(record, wording, rng, descriptions=None):
    """Draw the objectives' questions about one image: a list of (objective, target, question, answer) in random order.

    descriptions  category -> its descriptions in other images, which NegPred borrows
    """
    chosen = {name: objective for name, objective in OBJECTIVES.items() if name in wording.objectives}
    drawn = []
    for about in ("object", "pair"):
        asking = {name: objective for name, objective in chosen.items() if objective.about == about}
        for target in targets_of(record, about, wording, rng) if asking else ():
            for name, objective in asking.items():
                drawn.append((name, target, *objective.ask(target, record, wording, rng)))
    for name, objective in chosen.items():
        if objective.about == "absent" and record.absent:
            # no image is left without a question
            for target in draw_absent(record, wording, rng, descriptions or {}, at_least=int(not drawn)):
                drawn.append((name, target, *objective.ask(target, record, wording, rng)))
    rng.shuffle(drawn)
    return drawn


# ----- token ids and labels


def encode_prefix(tokenizer, template, visual_tokens):
    """Return the ids up to and including the image, which all questions about it share.

    template  "plain" (LLaVA's stage 1: the image alone) or "v1" (Vicuna's chat)
    Text on either side of the image is tokenised on its own, as LLaVA does, so the space before the image is a piece.
    Without an image (visual_tokens 0), the question brings that space.
    """
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    before = {"plain": "", "v1": f"{SYSTEM} {USER}" + " " * (visual_tokens > 0)}[template]
    return bos + tokenizer.encode(before) + [IMAGE_ID] * visual_tokens


def encode_question(tokenizer, question, before="\n"):
    """Return the ids of one user turn, up to where the answer starts. A newline separates the first turn from the image."""
    return tokenizer.encode(f"{before}{question} {ASSISTANT}")


def encode_segment(tokenizer, template, turns, first="\n"):
    """Turn (question, answer) turns into (ids, labels), turn by turn, so that exactly the answers are supervised.

    plain  the answer and a newline, no question
    v1     each question, then its answer and the end-of-sentence token, so that the model learns to stop
    """
    ids, labels = [], []
    for index, (question, answer) in enumerate(turns):
        if template == "plain":
            prompt, target = [], tokenizer.encode(answer + "\n")
        else:
            prompt = encode_question(tokenizer, question, f"{USER} " if index else first)
            target = tokenizer.encode(tokenizer.space + answer) + [tokenizer.eos_token_id]
        ids += prompt + target
        labels += [IGNORE] * len(prompt) + target
    return ids, labels


def pack(prefix, segments, max_length):
    """Pack a prefix and k (ids, labels) segments into one row of at most max_length tokens: a dict of equally long lists.

    input_ids, labels
    segment_of  0 in the prefix, then 1..k
    positions   each segment continues from the prefix
    The first segment is cut if it is too long (ValueError if that leaves no answer token). Later ones are added while
    they fit.
    """
    row = {
        "input_ids": list(prefix),
        "labels": [IGNORE] * len(prefix),
        "segment_of": [0] * len(prefix),
        "positions": list(range(len(prefix))),
    }
    for number, (ids, labels) in enumerate(segments, start=1):
        room = max(0, max_length - len(row["input_ids"]))
        if number > 1 and len(ids) > room:
            break
        ids, labels = ids[:room], labels[:room]
        if all(label == IGNORE for label in labels):
            raise ValueError(f"no room for a question's answer in {max_length} tokens; raise max_length in train.PRESETS")
        row["input_ids"] += ids
        row["labels"] += labels
        row["segment_of"] += [number] * len(ids)
        row["positions"] += range(len(prefix), len(prefix) + len(ids))
    return row


def find_places(input_ids):
    """Return where input_ids (B, T) hold IMAGE_ID, counted through rows laid end to end: long (images * N,)."""
    return (input_ids == IMAGE_ID).flatten().nonzero().squeeze(1)


def collate(rows):
    """Pad rows on the right to one length and find their answers: dict of the tensors that `LocVLM.forward` takes.

    segment_of is None unless a row has several segments. Lookups run here, on the CPU, so that a GPU never waits for them.
    """
    is_packed = any(max(row["segment_of"]) > 1 for row in rows)
    # on a GPU, compiled kernels are made for each length; FlexAttention, for packed rows, is fastest in blocks of 128
    multiple = (128 if is_packed else 32) if torch.cuda.is_available() else 1
    longest = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple

    def padded(key, fill):
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])  # (B, T)

    input_ids, labels = padded("input_ids", 0), padded("labels", IGNORE)
    segment_of, positions = padded("segment_of", -1), padded("positions", 0)
    # A token is predicted from the one before it: the shift is here, and nowhere else. Before a segment's first token
    # stands the prefix, whose last column is that token's position - 1.
    row_of, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # (A,) each: answer tokens, at column + 1
    opens = segment_of[row_of, columns + 1] != segment_of[row_of, columns]  # stage 1's captions: no question is before
    before = torch.where(opens, positions[row_of, columns + 1] - 1, columns)
    return {
        "input_ids": input_ids,
        "places": find_places(input_ids),
        "positions": positions,
        "segment_of": segment_of if is_packed else None,
        "targets": torch.stack([row_of, before, labels[row_of, columns + 1]]),  # (3, A)
    }


# ----- examples


class Examples:
    """Records as training rows. What a row holds depends on the seed and its number in the run alone.

    config          the model's: vision_config, and how many visual tokens an image becomes
    questions       how many segments follow an image, at most
    instruct_share  share of them that come from the conversations
    max_length      tokens of a row
    features        formats.features.Features, or None: the images are read
    """

    def __init__(
        self, records, tokenizer, config, wording, *, template="v1", questions=4, instruct_share=0.5, max_length=2048,
        seed=0, skip_bad=False, features=None,
    ):  # fmt: skip
        self.tokenizer, self.config, self.wording, self.template = tokenizer, config, wording, template
        self.questions, self.instruct_share, self.max_length, self.seed = questions, instruct_share, max_length, seed
        self.skip_bad, self.unreadable = skip_bad, set()  # ids of images that turned out damaged when they were drawn
        self.features = features
        self.prefix = encode_prefix(tokenizer, template, config.visual_tokens)
        self.text_prefix = encode_prefix(tokenizer, template, 0)
        self.descriptions = {}
        for o in (o for record in records for o in record.objects if o.description):
            self.descriptions.setdefault(o.name, []).append(o.description)
        fitting = [self.drop_long(record) for record in records]
        self.left_out = sum(len(r.conversations) - len(f.conversations) for r, f in zip(records, fitting, strict=True))
        if self.left_out and not skip_bad:
            first = next(r.id for r, f in zip(records, fitting, strict=True) if f is not r)
            problem = f"{self.left_out} conversations (the first is about image {first}) are too long"
            raise ValueError(f"{problem}: question and image exceed {max_length} tokens; skip them with --skip-bad")
        self.records = [record for record in fitting if self.draw_turns(record, random.Random(0))]
        asks_for_boxes = template != "plain" and any(OBJECTIVES[name].about != "absent" for name in wording.objectives)
        annotated = [record for record in records if record.present or record.absent] if asks_for_boxes else []
        if annotated and not any(targets_of(record, "object", wording, random.Random(0)) for record in annotated):
            raise ValueError(
                f"no box to ask for in {len(annotated)} images: boxes are missing, invalid, or not alone in their category; "
                "list the problems with `python -m tools.check`, or train without loc and rev: --objectives neg"
            )
        if not self.records:
            needs = "captions; train without it: --stages 2" if template == "plain" else "conversations, or boxes to ask for"
            raise ValueError(f"none of {len(records)} images has what this stage needs: {needs}")
        self.weights = np.array([record.weight for record in self.records])
        self.epoch_length = max(1, round(self.weights.sum()))  # rows per epoch
        self.is_weighted = bool((self.weights != 1).any())
        self.orders = {}  # epoch -> its order

    def batch(self, samples):
        """Collate the rows with these numbers in the run: (batch, ids of their records)."""
        rows, images, records = zip(*(self.row(*self.order(sample)) for sample in samples), strict=True)
        vision, images = self.config.vision_config, [image for image in images if image is not None]
        of_features = self.config.frames + vision.num_patches, vision.hidden_size
        shape = of_features if self.features else (3, vision.image_size, vision.image_size)
        batch = collate(rows)
        batch["pixel_values"] = torch.stack(images) if images else torch.empty(0, *shape)
        return batch, [record.id for record in records]

    def order(self, sample):
        """Return (index of the record, seed of its text) for row number `sample` of the run, counted over all epochs.

        A record of weight w is drawn floor(w) or ceil(w) times an epoch; rounding the epoch to whole rows may change this by
        one. Each epoch has new text; with weights, so has each row, because an epoch may hold a record twice.
        """
        epoch, place = divmod(sample, self.epoch_length)
        order = self.orders.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.records))
            if self.is_weighted:
                # systematic resampling: records laid end to end, as long as their weights, with evenly spaced marks on them
                ends = self.weights[order].cumsum()
                marks = (np.arange(self.epoch_length) + rng.random()) * ends[-1] / self.epoch_length
                order = rng.permutation(order[np.searchsorted(ends, marks, side="right").clip(max=len(ends) - 1)])
            self.orders = {epoch: order}  # another prefetching thread may replace it: read only the local name below
        return int(order[place]), (f"{epoch} {place}" if self.is_weighted else epoch)

    def row(self, index, text_seed):
        """Draw record `index`: (packed row, image (3, S, S) or features (P, Dv) or None, record).

        An image that turns out damaged stops the run. With skip_bad, the next record takes its place.
        """
        record, fmt = self.records[index], self.wording.fmt
        row = self.text_row(record, text_seed)
        if not record.image:
            return row, None, record
        if self.features:
            return row, self.features.read(record.image), record
        try:
            return row, preprocess(open_image(record.image), self.config.vision_config, fmt.geometry), record
        except ValueError as error:
            tolerated = min(max(1, len(self.records) // 100), len(self.records) - 1)
            if not self.skip_bad or len(self.unreadable | {record.id}) > tolerated:
                raise ValueError(f"{error}; --skip-bad skips up to one image in a hundred") from None
            self.unreadable.add(record.id)
            return self.row((index + 1) % len(self.records), text_seed)

    def text_row(self, record, text_seed):
        """Draw the text of a record: a packed row."""
        rng, (prefix, first) = random.Random(f"{self.seed} {text_seed} {record.id}"), self.start_of(record)
        segments = [encode_segment(self.tokenizer, self.template, turns, first) for turns in self.draw_turns(record, rng)]
        if len(prefix) + sum(len(ids) for ids, _ in segments) > self.max_length:
            rng.shuffle(segments)  # a full row drops its last segments; chance decides which, not their kind
        return pack(prefix, segments, self.max_length)

    def start_of(self, record):
        """Return the ids before a row's first question, and the text that this question starts with."""
        return (self.prefix, "\n") if record.image else (self.text_prefix, self.tokenizer.space)

    def draw_turns(self, record, rng):
        """Draw the turns of each segment of one row: captions in stage 1, else instructions and objectives."""
        if self.template == "plain":
            captions = record.captions or [turns[0][1] for turns in record.conversations]
            chosen = rng.sample(captions, min(self.questions, len(captions))) if record.image else []
            return [(("", caption),) for caption in chosen]
        drawn = [((q, a),) for _, _, q, a in draw_questions(record, self.wording, rng, self.descriptions)]
        conversations = rng.sample(record.conversations, len(record.conversations))
        share = self.instruct_share if drawn else 1.0
        conversations = conversations[: int(share * self.questions + rng.random())]
        return conversations + drawn[: self.questions - len(conversations)]

    def drop_long(self, record):
        """Return a record without the conversations whose first question leaves no room for an answer."""
        prefix, first = self.start_of(record)
        room = self.max_length - len(prefix)

        def fits(turns):  # a token is a byte or more, or the space that sentencepiece adds: most texts need no tokenizer
            text = f"{first}{turns[0][0]} {ASSISTANT}"
            return len(text.encode()) + 1 < room or len(self.tokenizer.encode(text)) < room

        kept = tuple(turns for turns in record.conversations if self.template == "plain" or fits(turns))
        return record if len(kept) == len(record.conversations) else replace(record, conversations=kept)


def marked(tokenizer, row):
    """Write a packed row as text: visual tokens counted, tokens with loss between « and », a line per segment."""
    tokens = zip(row["input_ids"], row["labels"], row["segment_of"], strict=True)
    parts, last = [], 0
    for (segment, has_loss, is_image), run in groupby(tokens, lambda t: (t[2], t[1] != IGNORE, t[0] == IMAGE_ID)):
        ids = [token for token, _, _ in run]
        parts += ["\n  "] * (segment != last)
        last = segment
        if is_image:
            parts.append(f"<image x {len(ids)}>")
        else:
            text = tokenizer.decode(ids).replace("\n", "\\n")
            end = "</s>" if ids[-1] == tokenizer.eos_token_id else ""
            parts.append(f"«{text}{end}»" if has_loss else text)
    return "<s>" * (tokenizer.bos_token_id is not None) + " ".join(parts).replace("\n   ", "\n  ")
