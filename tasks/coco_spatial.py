"""TODO tasks.coco_spatial."""

from collections import Counter

from evaluate import Item, flip_consistency, mean, mirrored
from formats.schema import box_from_xywh, box_problem
from tasks.files import asked_of, coco_names, find_image, keyed, listed, read_rows

# ----- the authors' COCO-Spatial

RELEASED_PROMPT = "Which side of the {obj_1} is the {obj_2}?"  # of the released code; App. E words it otherwise


def read_coco_spatial(questions, answers, images):
    """The released coco_spatial.json: where is the right object of each pair, in the image and in its mirror image?

    Its rule is not the paper's: pairs that do not overlap from left to right, in images of val2014. In the image the answer
    is always right, so each is asked of the mirror image too, where it is left.
    """
    content = read_rows(questions, "the authors' coco_spatial.json")
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise ValueError(
            f"{questions} has no dictionary 'data'; expected the authors' coco_spatial.json; is it COCO's own file?"
        )
    expected = "the authors' coco_spatial.json"
    categories = keyed(
        listed(content, "categories", questions, expected), questions, "id", {"id": int, "name": str}, expected
    )
    names = {c["id"]: c["name"] for c in categories.values()}
    items, left_out = [], Counter()
    for image_id, entry in data.items():
        try:
            size, file_name = (int(entry["width"]), int(entry["height"])), str(entry["file_name"])
            objects = entry["annotations"]
            called = [names[o["category_id"]] for o in objects]
            pairs = [(left, right) for left, right in entry.get("good_pairs") or ()]
            [objects[place] for pair in pairs for place in pair]
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{questions}: image {image_id} is amiss ({error!r}); expected file_name, width, height, annotations and "
                "good_pairs that point into them; check the file"
            ) from None
        left_out.update({"images without pairs": 1} if not pairs else {})
        path = find_image(images, *coco_names(file_name, "val2014")) if pairs else None
        for left, right in pairs:
            bboxes = [objects[place].get("bbox") for place in (left, right)]
            if problem := box_problem(bboxes[0], size) or box_problem(bboxes[1], size):
                left_out[f"pairs where a box {problem.split(' of size')[0]}"] += 1
                continue
            boxes_px = [box_from_xywh(bbox) for bbox in bboxes]
            if called.count(called[left]) > 1 or called.count(called[right]) > 1:
                left_out["pairs of a category that the image has twice"] += 1
            elif boxes_px[0][2] >= boxes_px[1][0]:
                left_out["pairs that are not left and right of each other"] += 1
            else:
                question = RELEASED_PROMPT.format(obj_1=called[left], obj_2=called[right])
                truth = {"word": "right", "boxes_px": boxes_px}
                items.append(Item(f"{image_id}:{left}-{right}", path, size, question, truth))
                items.append(mirrored(items[-1]))
    return asked_of(items, questions, images), left_out


def coco_spatial_metrics(items):
    metrics = {"accuracy": mean(item.correct for item in items)}
    for name, word in (("right (the image)", "right"), ("left (its mirror image)", "left")):
        metrics[name] = mean(item.correct for item in items if item.truth["word"] == word)
    return metrics | {
        "flip consistency": flip_consistency(items),
        "strict": mean(item.truth["strict"] for item in items),
        "neither word": mean(not item.correct and not item.truth["opposite"] for item in items),
        "questions": len(items),
    }
