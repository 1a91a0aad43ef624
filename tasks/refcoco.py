"""RefCOCO, RefCOCO+ and RefCOCOg: describe a box (refcoco, Tab. 10), and find what is described (rec).

Files      refs(unc).p or refs(umd).p beside its instances.json, from github.com/lichengunc/refer, or another of the forms in
           refs.py; COCO's train2014. --split: the paper takes testB, and val and test of RefCOCOg
Questions  refcoco: "What is at location (4, 52, 13, 63) in image?"; rec: "Where is ...?" with each sentence of each ref. The
           prompt, RevLoc's or LocPred's, depends on the seed and the ref alone
Score      refcoco: METEOR 1.5 of all answers together, against each ref's sentences (pip install pycocoevalcap, and Java);
           rec: IoU >= 0.5 with the true box, in original pixels
Run        python -m tasks refcoco runs/b2 --questions "refs(unc).p" --images train2014 --split testB
    >>> from coords import CoordFormat; from data import Wording
    >>> item = Item("10", None, (448, 224), "Where is left zebra?", {"box_px": (0, 0, 224, 112)}, "(0, 0, 112, 56)")
    >>> judge_loc(item, Wording(CoordFormat("ivb", 224))); item.boxes_px, item.correct
    ([(0.0, 0.0, 224.0, 56.0)], True)
"""

import random
import re
from collections import Counter

from data import LOC_PROMPTS, REV_PROMPTS, judge_loc, loc_question
from evaluate import Item, Task, locpred_metrics
from formats.eval_folder import require_images
from formats.images import image_size
from formats.schema import box_from_xywh, box_problem
from tasks.files import find_image, paper
from tasks.refs import FILE, read_refs
from tasks.words import meteor, require_meteor


def read_split(args):
    """Return the refs of a split with a valid box, [(ref, image path, size, box_px)], and a Counter {reason: refs skipped}."""
    refs, skipped, found = read_refs(args.questions, args.answers), Counter(), []
    splits = Counter(ref["split"] for ref in refs)
    if args.split is None and len(splits) > 1 or args.split is not None and args.split not in splits:
        names = ", ".join(f"{name} ({count})" for name, count in splits.items())
        raise ValueError(f"split {args.split} of {args.questions}, which has {names}; choose one of them with --split")
    refs = [ref for ref in refs if args.split in (None, ref["split"])]
    paths = [find_image(args.images, ref["file_name"], "train2014") for ref in refs]
    require_images(paths, args.questions, args.images)  # some sizes are read from them
    for ref, path in zip(refs, paths, strict=True):
        size = tuple(ref["size"] or image_size(path))
        if problem := box_problem(ref["bbox"], size):
            skipped[f"refs where the box {problem.split(' of size')[0]}"] += 1
        elif not ref["sentences"] or not all(isinstance(text, str) for _, text in ref["sentences"]):
            skipped["refs without a sentence"] += 1
        else:
            x1, y1, x2, y2 = box_from_xywh(ref["bbox"])
            found.append((ref, path, size, (x1, y1, min(x2, size[0]), min(y2, size[1]))))
    return found, skipped


def read_rec(args, wording):
    """Ask where the object of each sentence is."""
    (refs, skipped), items = read_split(args), []
    for ref, path, size, box_px in refs:
        for name, text in ref["sentences"]:
            question = loc_question(text, wording, random.Random(f"{args.seed} {name}"))
            items.append(Item(name, path, size, question, {"name": text, "box_px": box_px}))
    return items, skipped


def read_refcoco(args, wording):
    """Ask what is in each box. Boxes that a crop does not show are skipped."""
    require_meteor()
    (refs, skipped), items = read_split(args), []
    for ref, path, size, box_px in refs:
        if not wording.can_place(box_px, size):
            skipped["refs that the model's square does not show"] += 1
            continue
        prompt = random.Random(f"{args.seed} {ref['ref_id']}").choice(REV_PROMPTS)
        truth = {"sentences": [text for _, text in ref["sentences"]], "box_px": box_px}
        items.append(Item(ref["ref_id"], path, size, prompt.format(loc=wording.place(box_px, size)), truth))
    return items, skipped


def refcoco_metrics(items):
    """Compute METEOR 1.5 of all answers, and of the answers without our own "There is a"."""
    sentences, answers = {item.id: item.truth["sentences"] for item in items}, {item.id: item.answer for item in items}
    bare = {name: re.sub(r"^\s*there is an? ", "", answer, flags=re.IGNORECASE) for name, answer in answers.items()}
    score, bare_score = meteor([answers, bare], sentences)
    return {
        "METEOR 1.5": score, 'METEOR 1.5 without "There is a"': bare_score,
        "refs (meteor-1.5.jar and PTB tokens of pycocoevalcap)": len(items), "sentences": sum(map(len, sentences.values())),
        "empty answers": sum(not answer.strip() for answer in answers.values()),
    }  # fmt: skip


def submission(items):
    """Write the format of RefCOCO's own evaluation of descriptions."""
    return {"predictions": [{"sent": i.answer, "ref_id": int(i.id) if i.id.isdecimal() else i.id} for i in items]}


FILES = f"questions: {FILE}; answers: instances.json, if it is not beside the pickle"
TASKS = {
    "refcoco": Task(
        read_refcoco, lambda item, wording: None, refcoco_metrics,  # no single answer has a score
        REV_PROMPTS, FILES, ("split",), paper("refcoco"), submission=submission,
    ),
    "rec": Task(read_rec, judge_loc, locpred_metrics, LOC_PROMPTS, FILES, ("split",)),
}  # fmt: skip
