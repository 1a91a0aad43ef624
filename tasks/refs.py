"""Read RefCOCO's files, in four forms: objects in images ("refs"), each with sentences that refer to it.

A ref is {"ref_id", "file_name", "size": (width, height) or None, "split", "bbox": (x, y, w, h) in pixels,
"sentences": [(id, text)]}. `python -m tools.refs` writes such rows as JSON.
"""

import pickle
import re
from pathlib import Path

from data import read_instances
from formats.files import naming, require_file
from tasks.files import Rows, read_rows

FILE = "refs(unc).p with instances.json, the JSON of `python -m tools.refs`, Shikra's JSON lines, or MDETR's finetune_*.json"
REFS = Rows(FILE, {"ref_id": str, "file_name": str, "bbox": list, "sentences": list, "split": str | None}, "refs")
PICKLE = Rows("RefCOCO's refs(unc).p", {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list})


class PlainPickle(pickle.Unpickler):
    """Read a pickle of lists, dicts, strings and numbers only."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run any code, so it is not run")


def make_ref(ref_id, file_name, size, split, bbox, sentences):
    if size is not None and not (len(size) == 2 and min(size) > 0):
        raise ValueError(f"size {size}")
    row = {"ref_id": ref_id, "file_name": str(file_name), "size": size, "split": split, "bbox": bbox}
    return row | {"sentences": sentences}


def read_refs(path, instances=None):
    """Read refs from any of the four forms, or from MAttNet's sample of detections. instances: see `read_pickle`"""
    if Path(path).suffix in (".p", ".pkl", ".pickle"):
        return read_pickle(path, instances)
    content, refs = read_rows(path, FILE), {}
    if isinstance(content, dict) and "predictions" in content:
        raise ValueError(f"{path} holds a model's descriptions, not questions; pass {FILE}")
    is_ours = isinstance(content, dict) and "refs" in content
    rows = REFS.by_id(content, path) if is_ours else {}
    try:
        for name, row in rows.items():
            sentences = [(str(number), text) for number, text in row["sentences"]]
            refs[name] = make_ref(name, row["file_name"], row.get("size"), row.get("split"), row["bbox"], sentences)
        # in the other forms, the sentences about one box belong together
        for index, (file_name, size, bbox, sentence) in enumerate(() if is_ours else read_sentences(content)):
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
    """Read RefCOCO's own pickle, and the boxes in COCO's instances.json (default: beside the pickle)."""
    with naming(require_file(path, PICKLE.file), Exception), open(path, "rb") as file:
        content = PlainPickle(file, encoding="latin1").load()  # Python 2 wrote it
    rows, instances = PICKLE.by_id(content, path), Path(instances or Path(path).with_name("instances.json"))
    coco, refs = read_instances(instances), []
    images = {i["id"]: (i["file_name"], (i["width"], i["height"])) for i in coco["images"]}
    bboxes = {a["id"]: a.get("bbox") for a in coco["annotations"]}
    for name, row in rows.items():
        if row["image_id"] not in images or row["ann_id"] not in bboxes:
            problem = f"lacks image {row['image_id']} or annotation {row['ann_id']} of ref {name} in {path}"
            raise ValueError(f"{instances} {problem}; are they of one release?")
        try:
            sentences = [(str(s["sent_id"]), s["sent"]) for s in row["sentences"]]
        except (KeyError, TypeError):
            problem = f"ref {name} has sentences {str(row['sentences'])[:120]}, without sent_id and sent"
            raise ValueError(f"{path}: {problem}") from None
        refs.append(make_ref(name, *images[row["image_id"]], row["split"], bboxes[row["ann_id"]], sentences))
    return refs
