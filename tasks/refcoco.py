"""TODO tasks.refcoco."""

import pickle
import random
import re
from collections import Counter
from pathlib import Path

from data import REV_PROMPTS, loc_question, read_instances
from evaluate import Item
from formats.clips import naming
from formats.files import require_file, some, write_json
from formats.images import image_size
from formats.schema import box_from_xywh, box_problem
from tasks.files import asked_of, coco_names, find_image, keyed, read_rows, require_images
from tasks.words import meteor, require_meteor


class PlainPickle(pickle.Unpickler):
    """Read a pickle of lists, dicts, texts and numbers; one that wants anything else built is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run any code, so it is not run")


# ----- RefCOCO, RefCOCO+, RefCOCOg: descriptions of a box, and boxes for descriptions

REFS_FILE = (
    "refs(unc).p with instances.json, what `benchmarks.py refs` made of them, Shikra's JSON lines, "
    "or MDETR's finetune_*.json"
)


def ref(name, file_name, size, split, bbox, sentences):
    """One referred object. size: (width, height), or None; bbox: COCO's (x, y, w, h) in pixels; sentences: (id, text) pairs."""
    if size is not None and not (len(size) == 2 and min(size) > 0):
        raise ValueError(f"size {size}")
    return {
        "ref_id": name,
        "file_name": str(file_name),
        "size": size,
        "split": split,
        "bbox": bbox,
        "sentences": sentences,
    }


def read_pickle(path, instances):
    """RefCOCO's own files: the pickle, of which nothing but lists, dicts, texts and numbers is built, and COCO's boxes."""
    with naming(require_file(path, "RefCOCO's refs(unc).p"), Exception), open(path, "rb") as file:
        content = PlainPickle(file, encoding="latin1").load()  # Python 2 wrote it
    needs = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    rows = keyed(content, path, "ref_id", needs, "RefCOCO's refs(unc).p")
    instances = Path(instances) if instances else Path(path).with_name("instances.json")
    coco = read_instances(instances)
    sizes = {i["id"]: (i["file_name"], (i["width"], i["height"])) for i in coco["images"]}
    boxes = {a["id"]: a.get("bbox") for a in coco["annotations"]}
    refs = []
    for name, row in rows.items():
        if row["image_id"] not in sizes or row["ann_id"] not in boxes:
            raise ValueError(
                f"{instances} lacks image {row['image_id']} or annotation {row['ann_id']} of ref {name}; expected every one that "
                f"{path} names; are they of one release?"
            )
        try:
            sentences = [(str(s["sent_id"]), s["sent"]) for s in row["sentences"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: ref {name} has sentences {str(row['sentences'])[:120]}; expected sent_id and sent; check it"
            ) from None
        refs.append(ref(name, *sizes[row["image_id"]], row["split"], boxes[row["ann_id"]], sentences))
    return refs


def read_refs(path, instances):
    """Read referred objects from any of REFS_FILE, or from MAttNet's sample of detections: list of `ref`."""
    if Path(path).suffix in (".p", ".pkl", ".pickle"):
        return read_pickle(path, instances)
    content = read_rows(path, REFS_FILE)
    if isinstance(content, dict) and "predictions" in content:
        raise ValueError(
            f"{path} holds a model's descriptions, not what was referred to; expected {REFS_FILE}; give one of those"
        )
    ours, grouped = {}, {}  # sentences about one box belong together
    if isinstance(content, dict) and "refs" in content:
        needs = {"ref_id": str, "file_name": str, "bbox": list, "sentences": list, "split": str | None}
        ours = keyed(content["refs"], path, "ref_id", needs, REFS_FILE)
    try:
        if ours:
            return [
                ref(
                    name,
                    row["file_name"],
                    row.get("size"),
                    row.get("split"),
                    row["bbox"],
                    [(str(number), text) for number, text in row["sentences"]],
                )
                for name, row in ours.items()
            ]
        for index, (file_name, size, bbox, sentence) in enumerate(sentences_of(content)):
            key = (file_name, *bbox)
            one = grouped.setdefault(key, ref(str(len(grouped)), file_name, size, None, bbox, []))
            one["sentences"].append((str(index), sentence))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: a row is amiss ({error!r}); expected {REFS_FILE}; is this another file?") from None
    return list(grouped.values())


def sentences_of(content):
    """Give (file name, size or None, bbox, sentence) of each row of a file that knows no refs."""
    if isinstance(content, dict):  # MDETR's: an image of its own for each sentence
        boxes = {a["image_id"]: a["bbox"] for a in content["annotations"]}
        for image in content["images"]:
            yield image["file_name"], (image["width"], image["height"]), boxes[image["id"]], image["caption"]
    for row in content if isinstance(content, list) else ():
        if "expression" in row:  # Shikra's: corners
            x1, y1, x2, y2 = row["bbox"]
            size = (row["width"], row["height"]) if "width" in row else None
            yield row["img_path"], size, [x1, y1, x2 - x1, y2 - y1], row["expression"]
        else:  # MAttNet's, whose file names end in a number of their own
            yield re.sub(r"_\d+(?=\.\w+$)", "", row["pred_boxes_img_id"][0]), None, row["gt_box"], row["sent"]


def convert_refs(path, out, instances=None):
    """Write RefCOCO's pickle with its boxes as JSON that `read_refs` reads, so that the pickle is read once: count of refs."""
    refs = read_pickle(path, instances)
    write_json(out, {"refs": refs})
    return len(refs)


def refs_of(questions, answers, images, split):
    """The refs of a split whose box is one: [(ref, image path, size, box_px)], and a Counter of those left out."""
    refs, left_out, found = read_refs(questions, answers), Counter(), []
    splits = Counter(one["split"] for one in refs)
    if split is None and len(splits) > 1 or split is not None and split not in splits:
        told = ", ".join(f"{name} ({count})" for name, count in splits.items())
        raise ValueError(
            f"split {split} of {questions}, which has {told}; expected one of them; the paper takes testB, and val and test "
            "of RefCOCOg"
        )
    for one in refs:
        if split is None or one["split"] == split:
            path = find_image(images, *coco_names(one["file_name"], "train2014"))
            found.append((one, path))
    require_images((path for _, path in found), questions, images)  # their sizes are read below
    boxed = []
    for one, path in found:
        size = tuple(one["size"] or image_size(path))
        if problem := box_problem(one["bbox"], size):
            left_out[f"refs where the box {problem.split(' of size')[0]}"] += 1
        elif not one["sentences"] or not all(isinstance(text, str) for _, text in one["sentences"]):
            left_out["refs without a sentence"] += 1
        else:
            x1, y1, x2, y2 = box_from_xywh(one["bbox"])
            boxed.append((one, path, size, (x1, y1, min(x2, size[0]), min(y2, size[1]))))
    return boxed, left_out


def read_refcoco(questions, answers, images, split=None, *, wording, seed=0):
    """Region description (Tab. 10): RevLoc's question about each referred box, worded by `wording`; its sentences are the truth.

    Which of the three questions is asked is a function of (seed, ref). Boxes that a crop does not show are left out.
    Refuses where METEOR could not be computed.
    """
    require_meteor()
    boxed, left_out = refs_of(questions, answers, images, split)
    items = []
    for one, path, size, box_px in boxed:
        if not wording.can_place(box_px, size):
            left_out["refs that the model's square does not show"] += 1
            continue
        prompt = random.Random(f"{seed} {one['ref_id']}").choice(REV_PROMPTS)
        truth = {"sentences": [text for _, text in one["sentences"]], "box_px": box_px}
        items.append(Item(one["ref_id"], path, size, prompt.format(loc=wording.place(box_px, size)), truth))
    return asked_of(items, questions, images), left_out


def judge_refcoco(item, wording):
    """A description only counts in whole, see `refcoco_metrics`."""
    item.correct, item.boxes_px = None, []


def refcoco_metrics(items):
    """METEOR 1.5 of all answers, a ref's sentences their references; and of what follows "There is a", our own wording."""
    told, said = {item.id: item.truth["sentences"] for item in items}, {item.id: item.answer for item in items}
    bare = {name: re.sub(r"^\s*there is an? ", "", answer, flags=re.IGNORECASE) for name, answer in said.items()}
    whole, without = meteor([said, bare], told)
    return {
        "METEOR 1.5": whole,
        'METEOR 1.5 without "There is a"': without,
        "refs (meteor-1.5.jar and PTB tokens of pycocoevalcap)": len(items),
        "sentences": sum(map(len, told.values())),
        "empty answers": sum(not answer.strip() for answer in said.values()),
    }


def refcoco_submission(items):
    """The format of RefCOCO's own evaluation of descriptions."""
    return {"predictions": [{"sent": i.answer, "ref_id": int(i.id) if i.id.isdecimal() else i.id} for i in items]}


def read_rec(questions, answers, images, split=None, *, wording, seed=0):
    """Referring expression comprehension: LocPred's question with every sentence of every ref; acc@0.5 in original pixels."""
    boxed, left_out = refs_of(questions, answers, images, split)
    items = [
        Item(
            name,
            path,
            size,
            loc_question(text, wording, random.Random(f"{seed} {name}")),
            {"name": text, "box_px": box_px},
        )
        for one, path, size, box_px in boxed
        for name, text in one["sentences"]
    ]
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise ValueError(f"{questions} has sentences {some(twice)} twice; expected each id once; are two files in one?")
    return asked_of(items, questions, images), left_out


REF_OPTIONS = ("split", "wording", "seed")
