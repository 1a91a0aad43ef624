"""RefCOCO, RefCOCO+ and RefCOCOg: describe a box (refcoco, Tab. 10), and find what is described (rec).

Files      refs(unc).p or refs(umd).p beside its instances.json, from github.com/lichengunc/refer; refs_val.json of the shapes;
           Shikra's or MDETR's form; lmms-lab's testB-*.parquet. COCO's train2014. Paper: --split testB; RefCOCOg's val, test
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
from formats.files import naming, read_json, require_file
from formats.images import image_size
from formats.schema import IMAGE, entries_by_id, require_lists, try_box
from tasks.files import Rows, find_image, keys_of, of_split, read_rows
from tasks.words import meteor, require_meteor

FILE = "refs(unc).p with instances.json, refs_*.json of the shapes, Shikra's or MDETR's form, or lmms-lab's .parquet"
PICKLE = Rows("RefCOCO's refs(unc).p", {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list})


class PlainPickle(pickle.Unpickler):
    def find_class(self, module, name):
        """Refuse all but lists, dicts, strings and numbers."""
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run any code, so it is not run")


def read_refs(path, instances=None):
    """Read refs of any form, as dicts: ref_id, file_name, size and split (None if the file does not state them), bbox in pixels
    (x, y, w, h), and sentences, pairs (id, text). instances: see `read_pickle`"""
    is_pickle, refs = Path(path).suffix in (".p", ".pkl", ".pickle"), {}
    content = {"refs": read_pickle(path, instances)} if is_pickle else read_rows(path, FILE)
    try:
        for row in rows_of(content):
            ref_id, size, split = str(row.get("ref_id", len(refs))), row.get("size"), row.get("split")
            if ref_id in refs or not isinstance(split, str | None) or size and not (len(size) == 2 and min(size) > 0):
                raise ValueError(f"ref_id {ref_id}, size {size}, split {split}")
            ref = {"ref_id": ref_id, "file_name": str(row["file_name"]), "size": size, "split": split, "bbox": row["bbox"]}
            if not all(isinstance(text, str) for _, text in row["sentences"]):
                raise ValueError("a sentence that is no text")
            # without ref_id, the sentences about one box belong together
            key = ref_id if "ref_id" in row else (row["file_name"], *row["bbox"])
            refs.setdefault(key, ref | {"sentences": []})["sentences"] += [(str(i), text) for i, text in row["sentences"]]
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: a row is invalid ({error!r}); is this another file? It should be {FILE}") from None
    return list(refs.values())


def rows_of(content):
    """Yield the refs of the shapes and of RefCOCO, or a row for each sentence of MDETR's and Shikra's files."""
    if isinstance(content, dict) and "refs" in content:
        yield from content["refs"]
    elif isinstance(content, dict):  # MDETR's: each sentence has an image entry of its own
        bboxes = {a["image_id"]: a["bbox"] for a in content["annotations"]}
        for index, image in enumerate(content["images"]):
            size, sentences = (image["width"], image["height"]), [(index, image["caption"])]
            yield {"file_name": image["file_name"], "size": size, "bbox": bboxes[image["id"]], "sentences": sentences}
    elif {"file_name", "answer"} <= keys_of(content):  # lmms-lab's: some refs come twice; file names end in the object's number
        refs = {}
        for row in content:
            name = re.sub(r"(?<=_\d{12})_\d+(?=\.jpg$)", "", row["file_name"])
            texts = refs.setdefault((str(row["question_id"]), name, *row["bbox"]), [])
            texts += [text for text in row["answer"] if text not in texts]
        for (ref_id, name, *bbox), texts in refs.items():
            sentences = [(f"{ref_id}-{number}", text) for number, text in enumerate(texts)]
            yield {"ref_id": ref_id, "file_name": name, "bbox": bbox, "sentences": sentences}
    else:
        for index, row in enumerate(content):  # Shikra's: corners
            (x1, y1, x2, y2), size = row["bbox"], (row["width"], row["height"]) if "width" in row else None
            bbox, sentences = [x1, y1, x2 - x1, y2 - y1], [(index, row["expression"])]
            yield {"file_name": row["img_path"], "size": size, "bbox": bbox, "sentences": sentences}


def read_pickle(path, instances=None):
    """Read RefCOCO's own pickle, and the boxes in COCO's instances.json (default: beside the pickle), as the shapes' refs."""
    with naming(require_file(path, PICKLE.file), Exception), open(path, "rb") as file:
        content = PlainPickle(file, encoding="latin1").load()  # Python 2 wrote it
    rows, instances, refs = PICKLE.read(path, content), Path(instances or Path(path).with_name("instances.json")), []
    coco = read_json(require_file(instances, "RefCOCO's instances.json"))
    require_lists(coco, {"images": IMAGE, "annotations": {"id", "bbox"}}, instances, "RefCOCO's instances.json")
    images, bboxes = entries_by_id(coco, instances, defaultdict(list)), {str(a["id"]): a["bbox"] for a in coco["annotations"]}
    for name, row in rows.items():
        image_id, ann_id = str(row["image_id"]), str(row["ann_id"])
        if not images.get(image_id) or ann_id not in bboxes:
            problem = f"lacks image {image_id} or annotation {ann_id} of ref {name} in {path}"
            raise ValueError(f"{instances} {problem}; are they of one release?")
        ref = {"ref_id": name, "file_name": images[image_id].file_name, "size": images[image_id].size, "split": row["split"]}
        with naming(path, KeyError, TypeError):
            refs.append(ref | {"bbox": bboxes[ann_id], "sentences": [(str(s["sent_id"]), s["sent"]) for s in row["sentences"]]})
    return refs


def read_split(args):
    """Return the refs of a split with a valid box, [(ref, image path, size, box_px)], and a Counter {reason: refs skipped}."""
    skipped, found = Counter(), []
    for ref in of_split(read_refs(args.questions, args.answers), "split", args):
        path = find_image(args.images, ref["file_name"], "train2014")
        size = tuple(ref["size"] or image_size(path))
        box_px = try_box(ref["bbox"], size, skipped, "refs")
        if box_px and ref["sentences"]:
            found.append((ref, path, size, box_px))
        elif box_px:
            skipped["refs without a sentence"] += 1
    return found, skipped


def read_rec(args, wording):
    (refs, skipped), items = read_split(args), []
    for ref, path, size, box_px in refs:
        for name, text in ref["sentences"]:
            question = loc_question(text, wording, random.Random(f"{args.seed} {name}"))
            items.append(Item(name, path, size, question, {"name": text, "box_px": box_px}))
    return items, skipped


def read_refcoco(args, wording):
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
    sentences, answers = {item.id: item.truth["sentences"] for item in items}, {item.id: item.answer for item in items}
    bare = {name: re.sub(r"^\s*there is an? ", "", answer, flags=re.IGNORECASE) for name, answer in answers.items()}
    return {
        "METEOR 1.5": meteor(answers, sentences), 'METEOR 1.5 without "There is a"': meteor(bare, sentences),
        "refs (meteor-1.5.jar and PTB tokens of pycocoevalcap)": len(items), "sentences": sum(map(len, sentences.values())),
        "empty answers": sum(not answer.strip() for answer in answers.values()),
    }  # fmt: skip


FILES = f"questions: {FILE}; answers: instances.json, if it is not beside the pickle"
TASKS = {
    "refcoco": Task(read_refcoco, lambda item, wording: None, refcoco_metrics, REV_PROMPTS, FILES, ("split",),
                    paper_rows("refcoco"),  # no single answer has a score; what is submitted is for RefCOCO's own evaluation
                    submission=lambda items: {"predictions": [
                        {"sent": i.answer, "ref_id": int(i.id) if i.id.isdecimal() else i.id} for i in items]}),
    "rec": Task(read_rec, judge_loc, locpred_metrics, LOC_PROMPTS, FILES, ("split",)),
}
