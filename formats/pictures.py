"""Pictures to look at: an image with boxes and text (a card), and cards laid out in a PNG."""

import textwrap
from itertools import accumulate

from PIL import Image, ImageDraw, ImageOps

from formats.clips import ratio_problem
from formats.files import write_whole
from formats.images import is_clip, open_image
from video import frames_of, read_frames


def card(image, boxes, lines=(), width=280):
    """Scale an image to `width`, draw boxes on it and text lines under it. boxes: (box_px, colour) in the image's pixels."""
    scale = width / image.width
    picture = image.resize((width, max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box_px, colour in boxes:
        corners = [min(max(v * scale, -9), 9999) for v in box_px]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour, width=3)
    wrapped = [line for text in lines for line in textwrap.wrap(text, width // 6) or [""]]
    whole = ImageOps.expand(picture, (0, 0, 0, 13 * len(wrapped) + 6), "white")
    for i, line in enumerate(wrapped):
        ImageDraw.Draw(whole).text((2, picture.height + 2 + 13 * i), line, fill="black")
    return whole


def contact_sheet(cards, path, columns=4):
    """Lay out cards in rows and write one PNG."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    *tops, height = accumulate((max(card.height for card in row) + 8 for row in rows), initial=8)
    sheet = Image.new("RGB", (columns * (cards[0].width + 8) + 8, height), "white")
    for i, card in enumerate(cards):
        sheet.paste(card, (8 + i % columns * (card.width + 8), tops[i // columns]))
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


def sheet(frames, path, boxes=(), lines=()):
    """Write frames side by side as a PNG, with the same boxes on each. boxes: (box_px, colour); lines: a text per frame."""
    contact_sheet([card(frame, boxes, lines[i : i + 1]) for i, frame in enumerate(frames)], path, min(4, len(frames)))


def still(path, mirrored=False, as_clip=None):
    """Open an image; of a clip, its middle frame, which is what a model of images reads. Without as_clip, its name decides."""
    image = read_frames(path, 1)[0] if as_clip or (as_clip is None and is_clip(path)) else open_image(path)
    return ImageOps.mirror(image) if mirrored else image


def pictures_of(item, frames=0):
    """Open what a model reads of a question: `frames` frames, or 0: a still. Raise ValueError for another aspect ratio."""
    pictures = frames_of(item.image, frames) if frames else [still(item.image, as_clip=item.is_clip)]
    if problem := ratio_problem(item.image, pictures[0], item.size):
        raise ValueError(f"{problem}; correct or remove its annotations")
    return [ImageOps.mirror(picture) if item.mirrored else picture for picture in pictures]


def is_right(correct):
    """Return True or False for a judged answer (scores count as right from 0.5 on), None if nobody judged it."""
    return correct >= 0.5 if isinstance(correct, int | float) and abs(correct) < 1e300 else None


def overlay(items, path):
    """Draw four successes and four failures of an evaluation, with the boxes of truth (green) and answer (blue)."""
    right, wrong = ([item for item in items if bool(is_right(item.correct)) == wanted][:4] for wanted in (True, False))
    cards = []
    for item in right + wrong:
        truth = [item.truth["box_px"]] if "box_px" in item.truth else item.truth.get("boxes_px", [])
        boxes = [(box_px, "lime") for box_px in truth] + [(box_px, "blue") for box_px in item.boxes_px]
        mark = {True: "right: ", False: "wrong: ", None: ""}[is_right(item.correct)]
        picture = still(item.image, item.mirrored, item.is_clip)
        cards.append(card(picture, boxes, [mark + item.question[:400], "-> " + item.answer[:160]]))
    if right and wrong:
        cards[len(right) : len(right)] = [Image.new("RGB", (280, 1), "white")] * (4 - len(right))
    contact_sheet(cards, path)
