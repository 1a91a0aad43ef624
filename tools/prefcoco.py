"""Make the paper's training data from COCO: caption makes PRefCOCO-100K, localize Localize-Instruct-200K (Sec. 3.4, 4.1).

    torchrun --nproc-per-node 8 -m tools.prefcoco caption --model llava-v1.5-7b --vision clip-vit-large-patch14-336 \\
        --coco annotations/instances_train2017.json --images train2017_blurred --out prefcoco.json
    python -m tools.prefcoco localize --prefcoco prefcoco.json --coco annotations/instances_train2017.json --out localize.json

caption lets a visual LLM describe objects; localize turns the descriptions into conversations about locations. A killed caption
run resumes with the same command, on any number of processes, and ends in the same files.

model        run, llava-hf or LLaVA folder
coco         instances_*.json, the same one for both
images       folder of its images, faces blurred; localize only compares their sizes
temperature  0 is greedy
limit        use the first so many images only
prefcoco     file that `caption` wrote
neg_ratio    absent objects asked for, per described one
"""

import argparse
import random
import re
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from coords import GEOMETRIES, KINDS, CoordFormat
from data import ASSISTANT, LOCATIONS, OBJECTIVES, Object, Wording, draw_questions, name_pattern, targets_of
from evaluate import Answerer, Item
from formats.annotations import image_ids_of, read_file, read_records, require_usable
from formats.eval_folder import is_cut, require_images
from formats.files import read_json, remove_temporary, require_file, sha256, some, write_json
from formats.journal import join_processes, require_new, require_same_options, work_in_parts
from formats.schema import are_numbers, counted
from formats.weights import weights_sha256
from tools import command, positive

PROMPT = ("Describe the {category} in this image using one short sentence, referring to its visual features and spatial "
          "position relative to other objects in image.")  # App. C, to the letter  # fmt: skip


def caption(model, coco, images, out, vision=None, batch: positive = 8, max_new_tokens: positive = 64, temperature=0.0, seed=0,
            limit: positive = None, exclude=""):  # fmt: skip
    """Describe every object whose category occurs once in its image, with a visual LLM: PRefCOCO (Sec. 3.4, App. C).
    Write rejected captions, with the reason, to OUT's .rejected.json. Unfinished work lies in OUT.parts."""
    out, processes = Path(out), join_processes()
    parts, rejects = out.with_name(out.name + ".parts"), out.with_name(out.stem + ".rejected.json")
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    records, skipped = read_records([(coco, images, 1.0)], image_ids_of(exclude))
    records = [record for record in records if record.objects][:limit]
    if not records:
        raise ValueError(f"{coco} leaves no image with an object whose category occurs once; check --exclude")
    require_images([record.image for record in records], coco, images)
    require_usable(records, coco, "the annotations say")  # a damaged one is a rejected row
    options = {}
    if processes[0] == 0:
        print(counted(skipped), end="")
        pairs = sum(len(record.objects) for record in records)
        print(f"{len(records)} images with {pairs} unique objects (the paper: 95,899 images and 402,686 pairs)")
        options = {
            "model": weights_sha256(model), "vision": weights_sha256(vision) if vision else None, "coco": sha256(coco),
            "images": str(images), "limit": limit, "exclude": [sha256(path) for path in exclude.split(",") if path],
            "batch": batch, "decoding": decoding, "device": "cuda" if torch.cuda.is_available() else "cpu"}  # fmt: skip
        if out.exists():  # it is written last
            require_same_options(read_json(rejects)["made_with"] if rejects.is_file() else {}, options, out)
            shutil.rmtree(parts, ignore_errors=True)
            print(f"{out} is complete")
    if out.exists():
        return
    groups = {start: records[start : start + batch] for start in range(0, len(records), batch)}
    rows, *_ = work_in_parts(groups, partial(captioner, model, vision, decoding, processes[1]), parts, options, processes)
    if processes[0] == 0:
        kept, rejected = prefcoco_rows(records, [captions for _, group in sorted(rows) for captions in group], images)
        write_json(rejects, {"made_with": options, "rejected": rejected})
        remove_temporary([*out.parent.glob(out.name + "*"), *out.parent.glob(rejects.name + "*")])
        write_json(out, kept)
        shutil.rmtree(parts)
        print(f"{out}: {len(kept)} descriptions of objects in {len({row['image'] for row in kept})} images")
        for reason, count in Counter(row["reason"] for row in rejected).most_common():
            print(f"  rejected: {count} {reason}")


def captioner(model, vision, decoding, world):
    """Load the model. Return the functions records -> opened ones -> captions of each record: None if its image is damaged."""
    answerer = Answerer(argparse.Namespace(run=model, vision=vision, dtype=None, compile=False, **decoding), world)
    open_pictures, answer = answerer.functions(is_blind=False)

    def read(records):
        items_of, pictures = {}, []
        for record in records:
            asked = {f"{record.id}-{o.name}": PROMPT.format(category=o.name) for o in record.objects}
            items = [Item(name, record.image, None, question, {}) for name, question in asked.items()]
            with suppress(ValueError):  # one damaged file among a hundred thousand is a rejected row, not the end of the run
                of_image, opened = open_pictures(items)
                items_of, pictures = items_of | of_image, pictures + opened
        return records, (items_of, pictures)

    def describe(ready):
        records, opened = ready
        answers = answer(opened)
        for name, text in answers.items():
            if is_cut(text, answerer.tokenizer, decoding["max_new_tokens"]) and not text.rstrip().endswith((".", "!", "?", '"')):
                answers[name] += CUT
        return [[answers.get(f"{record.id}-{o.name}") for o in record.objects] for record in records]

    return read, describe


def prefcoco_rows(records, captions, images):
    """Join records and captions: (rows kept, rows rejected)."""
    kept, rejected = [], []
    for record, texts in zip(records, captions, strict=True):
        for o, text in zip(record.objects, texts, strict=True):
            question, image = "<image>\n" + PROMPT.format(category=o.name), record.image.relative_to(images).as_posix()
            row = {  # its box in COCO's own precision
                "id": f"{record.id}-{o.name}", "image": image, "size": list(record.size),
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text and text.removesuffix(CUT)}],
                "objective": "caption", "name": o.name, "box_px": [round(v, 2) for v in o.box_px]}  # fmt: skip
            description, reason = (None, "damaged image") if text is None else clean_caption(text, o.name)
            (rejected if reason else kept).append(row | ({"reason": reason} if reason else {"description": description}))
    return kept, rejected


CUT = " …"  # ends a caption at whose end the model had to stop
LONGEST = 60  # words of a description at most
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'])(?<!\b(?:St|Mt|Mr|Dr))[.!?]\"? (?=[A-Z\"])")
IN_IMAGE = r"in (?:the|this) (?:image|picture|photo|scene)"
SHOWS = r"(?:the|this) (?:image|picture|photo) (?:shows|features|depicts)"
LEAD = re.compile(rf"(?i)(?:{IN_IMAGE},? )?(?:there (?:is|are) |this is |{SHOWS} )?(?:an? |the |one )?")
VERBS = r"(?:is|are|was|were|has|have|had|can|may|(?:appear|seem|look|sit|stand|lie|rest|hang|lean|feature|wear|contain)s?)\b"
UNSEEN = r"not (?:visible|present|shown|clear|possible)|do(?:es)?(?: not|n't) (?:show|contain|include|feature|appear|see)"
REFUSAL = re.compile(rf"(?i)\b(sorry|can(?:'t| ?not)|unable|there (?:is|are)(?: no|n't)|{UNSEEN})\b")


def clean_caption(caption, category):
    """Turn a caption into '{category} that is ...', as in the paper's Fig. 4: (description, None), or (None, the fault).

    A sentence of another form loses only its article, because RevLoc's "There is a {category}." adds one.

    >>> clean_caption("The dog in the image is brown and white, lying on a couch.", "dog")
    ('dog that is brown and white, lying on a couch', None)
    >>> clean_caption("Under a lamp, a dog sleeps.", "dog"), clean_caption("I am sorry, there is no dog.", "dog")
    (('under a lamp, a dog sleeps', None), (None, 'refusal'))
    """
    text = SENTENCE_END.split(" ".join(caption.split()), maxsplit=1)[0].strip(" .!?\"'")
    if reason := caption_fault(text, category):
        return None, reason
    lead = LEAD.match(text)[0]
    text = text.removeprefix(lead)
    where = rf"(?: \(?(?:shown |seen )?{IN_IMAGE}\)?)?((?: (?!{VERBS}|that\b|which\b|who\b)[\w'-]+){{0,8}})"
    if match := re.match(rf"({name_pattern(category).pattern}){where},? (?:(?:that|which|who) )?({VERBS}.+)", text, re.IGNORECASE):
        return f"{match[1].lower()}{match[2]} that {match[3]}", None
    first, _, rest = text.partition(" ")
    is_proper = lead or rest[:1].isupper() or any(letter.isupper() for letter in first[1:])  # a name or an acronym
    return text if is_proper else first.lower() + text[len(first) :], None


def caption_fault(text, category):
    """Return why a sentence does not describe an object of a category, or None."""
    words = text.lower().split()
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    faults = {
        "empty": not words,
        "refusal": REFUSAL.search(text),
        "repeats the prompt": "using one short sentence" in text or ASSISTANT.rstrip(":") in text,
        "brackets or coordinates": re.search(r"[()\[\]{}<>]|\d\s*,\s*\d|\d\.\d", re.sub(rf"\({IN_IMAGE}\)", "", text)),
        "cut short": text.endswith(CUT.strip()),
        "too long": len(words) > LONGEST,
        "repeats itself": max(threes.values(), default=0) > 2 or any(len(set(three)) == 1 for three in threes),
        "names another thing": not name_pattern(category).search(text),
    }
    return next((fault for fault, is_found in faults.items() if is_found), None)


def localize(prefcoco, coco, out, images="", kind: Literal[KINDS] = "ivb", location: Literal[*LOCATIONS] = "box", neg_ratio=1.0,
             seed=0, side=224, geometry: Literal[GEOMETRIES] = "squash"):  # fmt: skip
    """Make Localize-Instruct-200K from PRefCOCO: one conversation of LLaVA's per image and objective (Sec. 3.4, App. B).
    NegPred asks about categories that are not in the image, half of them under a description from another image."""
    require_new(out)
    described, descriptions, sizes = {}, {}, {}  # by image, by category, by image
    content = read_json(require_file(prefcoco, "a file that `tools.prefcoco caption` wrote"))
    for row in content if isinstance(content, list) else [content]:
        is_row = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("image", "name", "description"))
        if not is_row or not are_numbers(row.get("box_px"), 4):
            raise ValueError(f"{prefcoco}: a row is {str(row)[:80]}, not one that `tools.prefcoco caption` wrote")
        described.setdefault(row["image"], []).append(Object(row["name"], tuple(row["box_px"]), row["description"]))
        descriptions.setdefault(row["name"], []).append(row["description"])
        sizes[row["image"]] = row.get("size")
    wording = Wording(CoordFormat(kind, side, geometry), tuple(OBJECTIVES), location, "description", neg_ratio)
    records = {record.image.as_posix(): record for record in read_file(coco, "")[0] if record.image}
    if unknown := sorted(described.keys() - records.keys()):
        raise ValueError(f"{prefcoco} describes {some(unknown)}, which {coco} lacks; pass the --coco it was made from")
    for image, objects in described.items():
        size, present = list(records[image].size), records[image].present
        if sizes[image] not in (None, size) or any(o.name not in present for o in objects):
            what = f"{image}: {sizes[image]} with {some([o.name for o in objects])}, there {size} with {some(present)}"
            raise ValueError(f"{prefcoco} and {coco} differ about {what}; pass the --coco it was made from")
    if images:
        require_usable([replace(records[name], image=Path(images) / name) for name in described], coco)
    rows = []
    for image, objects in described.items():
        rng, record = random.Random(f"{seed} {image}"), replace(records[image], objects=tuple(objects))
        if targets_of(record, "object", wording, rng):  # else the model's square shows none of them
            rows += conversations(record, wording, rng, descriptions)
    if not rows:
        raise ValueError(f"{prefcoco} describes no object that the model's square shows; check its rows, and --geometry")
    write_json(out, rows)
    print(f"{out}: {len(rows)} conversations about {len(described)} images (the paper: 200K, 95,899)")
    for objective in OBJECTIVES:
        counts = [len(row["conversations"]) // 2 for row in rows if row["objective"] == objective]
        print(f"  {objective}: {len(counts)} conversations of {sum(counts)} questions")


def conversations(record, wording, rng, descriptions=None):
    """Draw questions about an image: a row of LLaVA's per objective, with the fields that our own reader uses."""
    drawn, rows = draw_questions(record, wording, rng, descriptions), []
    for objective in OBJECTIVES:
        if not (turns := [turn for name, *turn in drawn if name == objective]):
            continue
        objects = [o for target, _, _ in turns for o in (target if isinstance(target, tuple) else [target])]  # a pair is two
        values = [{"from": who, "value": text} for _, *qa in turns for who, text in zip(("human", "gpt"), qa, strict=True)]
        values[0]["value"] = "<image>\n" + values[0]["value"]
        boxes_px = None if OBJECTIVES[objective].about == "absent" else [list(o.box_px) for o in objects]
        rows.append({
            "id": f"{record.id}-{objective}", "image": record.image.as_posix(), "size": list(record.size),
            "objective": objective, "names": [o.name for o in objects], "descriptions": [o.description for o in objects],
            "box_px": boxes_px, "conversations": values})  # fmt: skip
    return rows


main = command(__name__, caption, localize)
