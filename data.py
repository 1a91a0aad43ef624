"""From an annotated image to token ids and labels.

    python data.py show --coco instances.json --images FOLDER     examples as the model will read them
    python data.py check --coco instances.json --images FOLDER    what is missing, unreadable or wrong, before training

A `Record` keeps what is known of an image: its objects with box_px, absent categories, captions, conversations. Text
is written only when an example is drawn, so the representation, the objectives and the wording are flags of a run.
One row holds the image once and k question/answer segments behind it (`|` marks what carries loss):

    <s> A chat between ... questions. USER: <image>     the prefix, shared
      \\n Localize the object described cup in terms of (x1,y1,x2,y2) bbox? ASSISTANT: |It is located at (4, 52, 13, 63)</s>|
      \\n What is at location (60, 2, 90, 41) in image? ASSISTANT: |There is a dog.</s>|

Segments see the prefix and themselves, not each other (`model.packed_mask`): k separate rows, at the price of one image.
"""

import argparse
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from checkpoint import read_json
from clip_vit import CLIPVisionConfig, open_image, preprocess
from coords import CoordFormat, fault
from llama import Tokenizer

IMAGE_ID = -200  # stands in input_ids for each patch of an image (LLaVA's choice: no vocabulary has it)
IGNORE = -100  # label of a token without loss

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
REPR = {"box": "(x1,y1,x2,y2) bbox", "point": "(cx,cy) point"}
LOC_ANSWER = "It is located at {loc}"
NEG_ANSWER = "There is no such object in the image"
REV_ANSWER = "There is a {category}."
OBJECTIVES = ("loc", "neg", "rev")
# App. E; it gives no wording for above and below, so that one is ours
SIDE_PROMPTS = {
    "across": "Which side of {obj_1} is {obj_2} located?",
    "along": "Is {obj_2} located above or below {obj_1}?",
}
SIDE_ANSWERS = {
    side: "{obj_2} is located " + words + " {obj_1}."
    for side, words in {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
    }.items()
}

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna v1


def article(words):
    """'a dog', 'an orange': by the first letter."""
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


# ----- records


@dataclass(frozen=True)
class Object:
    """One annotated object. `description` is a pseudo-caption of the form '{name} that is ...', or None."""

    name: str
    box_px: tuple
    description: str | None = None


@dataclass(frozen=True)
class Record:
    """What is known of one image; all boxes in its own pixels."""

    id: str
    image: Path
    size: tuple  # (width, height)
    objects: tuple = ()  # those whose category occurs once: the paper's unique-instance filter (Sec. 3.3)
    present: tuple = ()  # every category annotated in the image
    absent: tuple = ()  # every other category of the data set
    captions: tuple = ()
    conversations: tuple = ()  # each a tuple of (question, answer) turns


def box_from_xywh(bbox):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2), same pixels."""
    x, y, w, h = bbox
    return x, y, x + w, y + h


def box_problem(bbox, size):
    """Say what is wrong with a COCO bbox (x, y, w, h), or None; a hundredth of a pixel over the edge is rounding."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in bbox)
    ):
        return "is not four finite numbers"
    if bbox[2] <= 0 or bbox[3] <= 0:
        return "has no area"
    x1, y1, x2, y2 = box_from_xywh(bbox)
    return fault((x1, y1, max(x1, x2 - 0.02), max(y1, y2 - 0.02)), size) and f"is outside its image of size {size}"


def read_instances(path):
    """Read a COCO instances JSON; refuse another schema by name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no annotation file {path}; expected COCO's instances_*.json; check the path")
    coco = read_json(path)
    lacking = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list)
    ]
    if lacking:
        raise ValueError(
            f"{path} lacks the lists {lacking}; expected COCO's instances_*.json; captions and LLaVA files have flags of their own"
        )
    return coco


def read_coco(instances, images, captions=None, conversations=None):
    """Read a COCO folder: list of Records in the order of the file, and a Counter of what was left out and why.

    instances      instances_*.json; an annotation may carry our extra key "description"
    images         folder of the image files
    captions       captions_*.json or None
    conversations  LLaVA-format JSON whose "image" names files of the same folder, or None
    Annotations without a usable box are left out and counted; iscrowd=1 counts as many of its category.
    """
    coco = read_instances(instances)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    left_out, by_image = Counter(), {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in by_image:
            left_out["annotations of unknown images"] += 1
        elif annotation["category_id"] not in names:
            left_out["annotations of unknown categories"] += 1
        else:
            by_image[annotation["image_id"]].append(annotation)
    told, talks = {}, {}
    for row in read_json(captions)["annotations"] if captions else ():
        told.setdefault(row["image_id"], []).append(row["caption"].strip())
    for file_name, turns in read_llava(conversations) if conversations else ():
        talks.setdefault(file_name, []).append(turns)
    records = []
    for image in coco["images"]:
        size, here = (image["width"], image["height"]), by_image[image["id"]]
        count = Counter(a["category_id"] for a in here)
        count.update(a["category_id"] for a in here if a.get("iscrowd"))
        objects = []
        for a in here:
            problem = box_problem(a.get("bbox"), size)
            if problem:
                left_out[f"boxes where the box {problem.split(' of size')[0]}"] += 1
            elif count[a["category_id"]] == 1:
                x1, y1, x2, y2 = box_from_xywh(a["bbox"])
                objects.append(
                    Object(names[a["category_id"]], (x1, y1, min(x2, size[0]), min(y2, size[1])), a.get("description"))
                )
        present = sorted({names[c] for c in count})
        records.append(
            Record(
                str(image["id"]),
                Path(images) / image["file_name"],
                size,
                tuple(objects),
                tuple(present),
                tuple(name for name in names.values() if name not in present),
                tuple(told.get(image["id"], ())),
                tuple(talks.pop(image["file_name"], ())),
            )
        )
    if talks:
        left_out["conversations about images that the instances file lacks"] += len(talks)
    return records, left_out


def read_llava(path):
    """Read LLaVA-format JSON: yields (image file name, turns), turns a tuple of (question, answer) without '<image>'."""
    rows = read_json(path)
    for row in rows:
        try:
            said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: a row is {str(row)[:80]}; expected LLaVA's id, image, conversations [{{from, value}}]; convert it"
            ) from None
        if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) or not said:
            raise ValueError(
                f"{path}: row {row.get('id')!r} has turns {[who for who, _ in said]}; expected human and gpt in turn; fix the row"
            )
        texts = [text.replace("<image>", "").strip() for _, text in said]
        yield row.get("image"), tuple(zip(texts[0::2], texts[1::2], strict=True))


def read_records(images, coco=None, llava=None, captions=None):
    """Read whatever a run is given: a COCO folder, with LLaVA conversations about its images, or LLaVA rows alone."""
    if coco:
        return read_coco(coco, images, captions, llava)
    if not llava:
        raise ValueError("no data; expected --coco instances.json or --llava chat.json, with --images; give one")
    records = []
    for index, (file_name, turns) in enumerate(read_llava(llava)):
        records.append(
            Record(str(index), Path(images) / file_name, (0, 0), captions=(turns[0][1],), conversations=(turns,))
        )
    return records, Counter()


# ----- questions


@dataclass(frozen=True)
class Wording:
    """How an example's text is written: flags of the run, not of the data."""

    fmt: CoordFormat
    objectives: tuple = OBJECTIVES
    location: str = "box"  # or "point"
    words: str = "name"  # what names an object: "name", "description" or "mixed" (half and half)
    neg_ratio: float = 1.0  # absent objects asked for, per object that is there

    def place(self, box_px, size):
        """Write a location as text."""
        if self.location == "box":
            return self.fmt.encode_box(box_px, size)
        x1, y1, x2, y2 = box_px
        return self.fmt.encode_point(((x1 + x2) / 2, (y1 + y2) / 2), size)

    def can_place(self, box_px, size):
        """Say whether enough of a box is in the model's square to ask for it: half, and its centre for a point."""
        x1, y1, x2, y2 = box_px
        centre = self.fmt.unit_from_px(((x1 + x2) / 2, (y1 + y2) / 2), size)
        return self.fmt.visible(box_px, size) >= 0.5 and all(0 <= v <= 1 for v in centre)


def loc_question(category, wording, rng):
    return rng.choice(LOC_PROMPTS).format(category=category, repr=REPR[wording.location])


def draw_questions(record, wording, rng, descriptions=None):
    """Draw the objectives' question/answer pairs for one image: (objective, question, answer), in random order.

    LocPred and RevLoc for each unique object, NegPred for absent categories (Sec. 3.3, App. B).
    descriptions: category -> descriptions of it in other images, which NegPred may borrow.
    """

    def called(name, description):
        if wording.words == "name" or description is None or (wording.words == "mixed" and rng.random() < 0.5):
            return name
        return description

    objects = [o for o in record.objects if wording.can_place(o.box_px, record.size)]
    pairs = []
    for o in objects:
        where = wording.place(o.box_px, record.size)
        if "loc" in wording.objectives:
            pairs.append(
                ("loc", loc_question(called(o.name, o.description), wording, rng), LOC_ANSWER.format(loc=where))
            )
        if "rev" in wording.objectives:
            pairs.append(
                (
                    "rev",
                    rng.choice(REV_PROMPTS).format(loc=where),
                    REV_ANSWER.format(category=called(o.name, o.description)),
                )
            )
    if "neg" in wording.objectives and record.absent:
        wanted = wording.neg_ratio * max(1, len(objects))
        count = min(int(wanted) + (rng.random() < wanted % 1), len(record.absent))
        for name in rng.sample(record.absent, count):
            borrowed = rng.choice(descriptions[name]) if descriptions and descriptions.get(name) else None
            pairs.append(("neg", loc_question(called(name, borrowed), wording, rng), NEG_ANSWER))
    rng.shuffle(pairs)
    return pairs


# ----- token ids and labels


def encode_prefix(tokenizer, template, num_patches):
    """Ids up to and with the image, the same for every question about it. `plain` is LLaVA's stage 1, `v1` Vicuna's chat.

    Text on either side of the image is tokenised on its own, as LLaVA does.
    """
    before = tokenizer.encode(SYSTEM + " USER: ") if template == "v1" else []
    return [tokenizer.bos_token_id] + before + [IMAGE_ID] * num_patches


def encode_question(tokenizer, question, first=True):
    """Ids of one user turn up to where the answer starts; the first one follows the image."""
    return tokenizer.encode(("\n" if first else "USER: ") + question + " ASSISTANT:")


def encode_segment(tokenizer, template, turns):
    """(question, answer) turns -> (ids, labels). Built turn by turn: what is supervised is what was put there as answer.

    plain: the answer and a line end, no question. v1: each answer and its end-of-sentence token, so that the model
    learns to stop.
    """
    ids, labels = [], []
    for index, (question, answer) in enumerate(turns):
        if template == "plain":
            asked, said = [], tokenizer.encode(answer + "\n")
        else:
            asked, said = (
                encode_question(tokenizer, question, index == 0),
                tokenizer.encode(answer) + [tokenizer.eos_token_id],
            )
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


def pack(prefix, segments, max_length):
    """A prefix and k (ids, labels) segments -> one row: dict of equally long lists.

    input_ids, labels; `segments` 0 for the prefix, 1..k; `positions` continue from the prefix in each segment. A
    segment is cut where its position reaches max_length; one with no supervised token left is an error.
    """
    row = {
        "input_ids": list(prefix),
        "labels": [IGNORE] * len(prefix),
        "segments": [0] * len(prefix),
        "positions": list(range(len(prefix))),
    }
    for number, (ids, labels) in enumerate(segments, start=1):
        ids, labels = ids[: max_length - len(prefix)], labels[: max_length - len(prefix)]
        if all(label == IGNORE for label in labels):
            raise ValueError(
                f"a question leaves no room for its answer in {max_length} tokens, {len(prefix)} of them before it; raise max_length"
            )
        row["input_ids"] += ids
        row["labels"] += labels
        row["segments"] += [number] * len(ids)
        row["positions"] += range(len(prefix), len(prefix) + len(ids))
    return row


def collate(rows, images=None):
    """Right-pad rows to one length: dict of long (B, T); padding has segment -1. `images`: list of (3, S, S) or None."""
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": 0, "labels": IGNORE, "segments": -1, "positions": 0}
    batch = {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for key, fill in filler.items()
    }
    if images is not None:
        batch["pixel_values"] = torch.stack(images)
    return batch


@lru_cache(maxsize=4)
def permutation(seed, epoch, length):
    return np.random.default_rng([seed, epoch]).permutation(length)


class Examples:
    """Records as training rows: `row(index, epoch)` draws one; what it draws is a function of (seed, epoch, index) alone."""

    def __init__(
        self,
        records,
        tokenizer,
        vision,
        wording,
        template="v1",
        questions=4,
        instruct_share=0.5,
        max_length=2048,
        seed=0,
    ):
        self.tokenizer, self.wording, self.template = tokenizer, wording, template
        self.questions, self.instruct_share, self.max_length, self.seed = questions, instruct_share, max_length, seed
        self.prefix = encode_prefix(tokenizer, template, vision.num_patches)
        self.descriptions = {}
        for record in records:
            for o in record.objects:
                if o.description:
                    self.descriptions.setdefault(o.name, []).append(o.description)
        self.records = [record for record in records if self.turns(record, random.Random(0))]
        if not self.records:
            raise ValueError(
                f"none of {len(records)} images has anything to say for template {template!r} and objectives {wording.objectives}; "
                "expected captions, conversations or unique objects; check the data flags"
            )

    def turns(self, record, rng):
        """Draw the k segments of one row, each a conversation: captions in stage 1, else objectives and instructions."""
        if self.template == "plain":
            return rng.sample(
                [(("", caption),) for caption in record.captions], min(self.questions, len(record.captions))
            )
        located = [
            ((question, answer),)
            for _, question, answer in draw_questions(record, self.wording, rng, self.descriptions)
        ]
        talks = rng.sample(record.conversations, len(record.conversations))
        share = self.instruct_share if located else 1.0
        wanted = int(share * self.questions + rng.random())
        talks = talks[:wanted]
        return talks + located[: self.questions - len(talks)]

    def row(self, index, epoch):
        """Draw record `index` of epoch `epoch`: (packed row, image tensor, record)."""
        record = self.records[index]
        rng = random.Random(f"{self.seed} {epoch} {record.id}")
        segments = [encode_segment(self.tokenizer, self.template, turns) for turns in self.turns(record, rng)]
        image = preprocess(open_image(record.image), self.wording.fmt.side, self.wording.fmt.geometry)
        return pack(self.prefix, segments, self.max_length), image, record

    def order(self, sample):
        """The `sample`-th draw of the run -> (index, epoch): every epoch is one permutation, seeded by (seed, epoch)."""
        epoch, place = divmod(sample, len(self.records))
        return int(permutation(self.seed, epoch, len(self.records))[place]), epoch

    def batch(self, samples):
        """Collate the given draws of the run; also gives their record ids."""
        rows, images, records = zip(*(self.row(*self.order(sample)) for sample in samples), strict=True)
        return collate(rows, images), [record.id for record in records]


# ----- to look at, and to check


def marked(tokenizer, row):
    """A packed row as text: patches counted, what carries loss between « and »."""
    out, run, loss = [], [], False

    def flush():
        if run:
            text = tokenizer.decode(run).replace("\n", "\\n")
            out.append(f"«{text}{'</s>' if run[-1] == tokenizer.eos_token_id else ''}»" if loss else text)
            run.clear()

    for i, (token, label, segment) in enumerate(zip(row["input_ids"], row["labels"], row["segments"], strict=True)):
        if i and segment != row["segments"][i - 1]:
            flush()
            out.append("\n  ")
        if (label != IGNORE) != loss:
            flush()
            loss = label != IGNORE
        if token == IMAGE_ID:
            if row["input_ids"][i - 1] != IMAGE_ID:
                flush()
                out.append(f"<image x {row['input_ids'].count(IMAGE_ID)}>")
        else:
            run.append(token)
    flush()
    return "<s>" + " ".join(out).replace("\n   ", "\n  ")


def check(coco, images):
    """List every problem of a COCO folder: one line each, none if it is clean. Opens every image."""
    coco = read_instances(coco)
    names = {category["id"] for category in coco["categories"]}
    sizes, problems = {}, []
    for image in coco["images"]:
        sizes[image["id"]] = (image["width"], image["height"])
        path = Path(images) / image["file_name"]
        if not path.resolve().is_relative_to(Path(images).resolve()):
            problems.append(f"image {image['id']}: {image['file_name']} leaves the images folder")
            continue
        try:
            size = open_image(path).size
            if size != sizes[image["id"]]:
                problems.append(f"image {image['id']}: {path} is {size}, the annotations say {sizes[image['id']]}")
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"image {image['id']}: {error}")
    for a in coco["annotations"]:
        if a["image_id"] not in sizes:
            problems.append(f"annotation {a['id']}: no image {a['image_id']}")
            continue
        if a["category_id"] not in names:
            problems.append(f"annotation {a['id']}: no category {a['category_id']}")
        problem = box_problem(a.get("bbox"), sizes[a["image_id"]])
        if problem:
            problems.append(f"annotation {a['id']}: bbox {a.get('bbox')} {problem}")
    return problems


def show(args):
    """Print examples as the model will read them."""
    records, left_out = read_records(args.images, args.coco, args.llava, args.captions)
    wording = Wording(CoordFormat(args.kind, args.side), location=args.location, words=args.words)
    examples = Examples(
        records,
        Tokenizer(args.tokenizer),
        CLIPVisionConfig(image_size=args.side),
        wording,
        args.template,
        seed=args.seed,
    )
    for index in range(min(args.number, len(examples.records))):
        row, image, record = examples.row(*examples.order(index))
        print(
            f"--- image {record.id}  {record.image}  {record.size[0]} x {record.size[1]} px -> {tuple(image.shape)}, {len(row['input_ids'])} tokens"
        )
        print(marked(examples.tokenizer, row))
    for what, count in left_out.items():
        print(f"left out: {count} {what}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Look at training data, or check it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("show", "print examples, what carries loss between « and »"),
        ("check", "list missing or unreadable images and bad boxes"),
    ):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--coco", required=True, help="instances_*.json")
        sub.add_argument("--images", required=True, help="folder of the images")
        if name == "show":
            sub.add_argument("--llava", help="LLaVA-format conversations about the same images")
            sub.add_argument("--captions", help="captions_*.json")
            sub.add_argument("--tokenizer", default="tiny/llama", help="folder with tokenizer.model")
            sub.add_argument(
                "--template", choices=("v1", "plain"), default="v1", help="v1: stage 2; plain: captions of stage 1"
            )
            sub.add_argument(
                "--kind", choices=("nfp", "ivb", "diga"), default="ivb", help="how coordinates are written"
            )
            sub.add_argument("--location", choices=("box", "point"), default="box", help="what a location is")
            sub.add_argument(
                "--words", choices=("name", "description", "mixed"), default="name", help="what names an object"
            )
            sub.add_argument("--side", type=int, default=224, help="of the model's square image")
            sub.add_argument("--number", type=int, default=3, help="how many images")
            sub.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(argv)
    if args.command == "check":
        problems = check(args.coco, args.images)
        coco = read_instances(args.coco)
        print("\n".join(problems[:1000]))
        print(
            f"{len(coco['images'])} images, {len(coco['annotations'])} annotations, {len(coco['categories'])} categories: {len(problems) or 'no'} problems"
        )
        sys.exit(1 if problems else 0)
    show(args)


if __name__ == "__main__":
    main()
