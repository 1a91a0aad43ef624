"""RefCOCO, RefCOCO+ and RefCOCOg: describe a box (refcoco, Tab. 10), and find what is described (rec).

Files      refs(unc).p or refs(umd).p beside its instances.json, from github.com/lichengunc/refer; refs_val.json of the shapes
           world; Shikra's or MDETR's form. COCO's train2014. --split: in the paper, testB, and RefCOCOg's val and test
Questions  refcoco: "What is at location (4, 52, 13, 63) in image?"; rec: "Where is ...?" with each sentence of each ref. The
           prompt, RevLoc's or LocPred's, depends on the seed and the ref alone
Score      refcoco: METEOR 1.5 of all answers together (pip install pycocoevalcap, and Java); rec: IoU >= 0.5, original pixels
Run        python -m tasks refcoco runs/b2 --questions "refs(unc).p" --images train2014 --split testB
    >>> from coords import CoordFormat; from data import Wording
    >>> item = Item("10", None, (448, 224), "Where is left zebra?", {"box_px": (0, 0, 224, 112)}, "(0, 0, 112, 56)")
    >>> judge_loc(item, Wording(CoordFormat("ivb", 224))); item.boxes_px, item.correct
    ([(0.0, 0.0, 224.0, 56.0)], True)
"""

import pickle
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from data import LOC_PROMPTS, REV_PROMPTS, judge_loc, loc_question
from evaluate import Item, Task, locpred_metrics, paper_rows
from formats.eval_folder import require_images
from formats.files import naming, read_json, require_file
from formats.images import image_size
from formats.schema import IMAGE, clip_box, entries_by_id, require_lists
from tasks.files import Rows, find_image, read_rows
from tasks.words import meteor, require_meteor

FILE = "refs(unc).p with instances.json, refs_*.json of the shapes, Shikra's JSON lines, or MDETR's finetune_*.json"
REFS = Rows(FILE, {"ref_id": str, "file_name": str, "bbox": list, "sentences": list, "split": str | None}, "refs")
PICKLE = Rows("RefCOCO's refs(unc).p", {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list})


class PlainPickle(pickle.Unpickler):
    def find_class(self, module, name):
        """Refuse all but lists, dicts, strings and numbers."""
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run any code, so it is not run")


def make_ref(ref_id, file_name, size, split, bbox, sentences):
    """Return a ref: a box (x, y, w, h), in pixels of an image of `size` or None, and the sentences [(id, text)] about it."""
    if size is not None and not (len(size) == 2 and min(size) > 0):
        raise ValueError(f"size {size}")
    return {"ref_id": ref_id, "file_name": str(file_name), "size": size, "split": split, "bbox": bbox, "sentences": sentences}


def read_refs(path, instances=None):
    """Read refs from any of the four forms, or from MAttNet's sample of detections. instances: see `read_pickle`"""
    is_pickle, refs = Path(path).suffix in (".p", ".pkl", ".pickle"), {}
    content = {"refs": read_pickle(path, instances)} if is_pickle else read_rows(path, FILE)
    keys = content if isinstance(content, dict) else ()
    if "predictions" in keys:
        raise ValueError(f"{path} holds a model's descriptions, not questions; pass {FILE}")
    rows = REFS.read(path, content) if "refs" in keys else {}
    try:
        for name, row in rows.items():
            sentences = [(str(number), text) for number, text in row["sentences"]]
            refs[name] = make_ref(name, row["file_name"], row.get("size"), row.get("split"), row["bbox"], sentences)
        # in the other forms, the sentences about one box belong together
        for index, (file_name, size, bbox, sentence) in enumerate(() if rows else read_sentences(content)):
            ref = refs.setdefault((file_name, *bbox), make_ref(str(len(refs)), file_name, size, None, bbox, []))
            ref["sentences"].append((str(index), sentence))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: a row is invalid ({error!r}); is this another file? It should be {FILE}") from None
    return list(refs.values())


def read_sentences(content):
    """Yield (file name, size or None, bbox, sentence) for each row of a file that has no refs."""
    if isinstance(content, dict):  # MDETR's: each sentence has an image entry of its own
        bboxes = {a["image_id"]: a["bbox"] for a in content["annotations"]}
        for image in content["images"]:
            yield image["file_name"], (image["width"], image["height"]), bboxes[image["id"]], image["caption"]
    for row in content if isinstance(content, list) else ():
        if "expression" in row:  # Shikra's: corners
            x1, y1, x2, y2 = row["bbox"]
            size = (row["width"], row["height"]) if "width" in row else None
            yield row["img_path"], size, [x1, y1, x2 - x1, y2 - y1], row["expression"]
        else:  # MAttNet's, whose file names end in a number of their own
            yield re.sub(r"_\d+(?=\.\w+$)", "", row["pred_boxes_img_id"][0]), None, row["gt_box"], row["sent"]


def read_pickle(path, instances=None):
    """Read RefCOCO's own pickle, and the boxes in COCO's instances.json (default: beside the pickle), as rows of REFS."""
    with naming(require_file(path, PICKLE.file), Exception), open(path, "rb") as file:
        content = PlainPickle(file, encoding="latin1").load()  # Python 2 wrote it
    rows, instances = PICKLE.read(path, content), Path(instances or Path(path).with_name("instances.json"))
    coco, refs = read_json(require_file(instances, "RefCOCO's instances.json")), []
    require_lists(coco, {"images": IMAGE, "annotations": {"id", "bbox"}}, instances, "RefCOCO's instances.json")
    images, bboxes = entries_by_id(coco, instances, defaultdict(list)), {str(a.get("id")): a.get("bbox") for a in coco["annotations"]}
    for name, row in rows.items():
        image_id, ann_id = str(row["image_id"]), str(row["ann_id"])
        if not images.get(image_id) or ann_id not in bboxes:
            problem = f"lacks image {row['image_id']} or annotation {row['ann_id']} of ref {name} in {path}"
            raise ValueError(f"{instances} {problem}; are they of one release?")
        with naming(path, KeyError, TypeError):
            sentences = [(str(s["sent_id"]), s["sent"]) for s in row["sentences"]]
        image, split = images[image_id], row["split"]
        refs.append(make_ref(name, image.file_name, image.size, split, bboxes[ann_id], sentences))
    return refs


def read_split(args):
    """Return the refs of a split with a valid box, [(ref, image path, size, box_px)], and a Counter {reason: refs skipped}."""
    refs, skipped, found = read_refs(args.questions, args.answers), Counter(), []
    splits = Counter(ref["split"] for ref in refs)
    if args.split is None and len(splits) > 1 or args.split is not None and args.split not in splits:
        names = ", ".join(f"{name} ({count})" for name, count in splits.items())
        raise ValueError(f"split {args.split} of {args.questions}, which has {names}; choose one of them with --split")
    refs = [ref for ref in refs if args.split in (None, ref["split"])]
    paths = [find_image(args.images, ref["file_name"], "train2014") for ref in refs]
    require_images([path for ref, path in zip(refs, paths, strict=True) if not ref["size"]], args.questions, args.images)
    for ref, path in zip(refs, paths, strict=True):
        size = tuple(ref["size"] or image_size(path))
        if box_px := clip_box(ref["bbox"], size, skipped, "refs"):
            if ref["sentences"] and all(isinstance(text, str) for _, text in ref["sentences"]):
                found.append((ref, path, size, box_px))
            else:
                skipped["refs without a sentence"] += 1
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
    }


def submission(items):
    """Write the format of RefCOCO's own evaluation of descriptions."""
    return {"predictions": [{"sent": i.answer, "ref_id": int(i.id) if i.id.isdecimal() else i.id} for i in items]}


FILES = f"questions: {FILE}; answers: instances.json, if it is not beside the pickle"
TASKS = {
    "refcoco": Task(read_refcoco, lambda item, wording: None, refcoco_metrics, REV_PROMPTS, FILES, ("split",),
                    paper_rows("refcoco"), submission=submission),  # no single answer has a score
    "rec": Task(read_rec, judge_loc, locpred_metrics, LOC_PROMPTS, FILES, ("split",)),
}
