"""Boxes as text, and text as boxes (LocVLM, Sec. 3.2 and App. A).

A box is (x1, y1, x2, y2): top-left corner, then bottom-right corner, x to the right, y down; a point is (x, y).
There are three frames, and a name always says which one:

    box_px    pixels of the ORIGINAL image, floats in [0, W] x [0, H]
    box_unit  fractions of the MODEL's square input image, floats in [0, 1]
    box_bins  the same square in integers 0..n_bins, both ends included: what IVB text holds

`CoordFormat` goes from box_px to text and back. What lies between pixels and the square is one rectangle, `window`:
the part of the original plane that the model's square shows. `clip_vit.preprocess` cuts images by the same rectangle.
"""

import math
import re
from dataclasses import dataclass

KINDS = ("nfp", "ivb", "diga")
GEOMETRIES = ("squash", "pad", "crop")
PATCH = 14  # CLIP ViT-L/14, and so the size of a DIGA anchor cell

_NUMBER = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"  # one way to read any digits: no backtracking over 1 MB of them


def resized(size, side):
    """Give (width, height) after the shorter edge became `side`: CLIP's resize before the centre crop.

    >>> resized((640, 480), 224)
    (298, 224)
    """
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def window(size, geometry, side):
    """Give (left, top, width, height), in pixels of the original image, of what the model's square shows.

    squash  the whole image; the two axes are scaled apart (the paper's arithmetic)
    pad     the square around the image, which lies in the middle (LLaVA-1.5): reaches outside the image
    crop    the square in the middle of the image (CLIP, LLaVA v1): the ends of the longer axis are lost

    >>> window((640, 480), "squash", 224), window((640, 480), "pad", 224), window((640, 480), "crop", 240)
    ((0, 0, 640, 480), (0, -80, 640, 640), (80.0, 0.0, 480.0, 480.0))
    """
    width, height = size
    if geometry == "squash":
        return 0, 0, width, height
    if geometry == "pad":
        longer = max(width, height)
        return -((longer - width) // 2), -((longer - height) // 2), longer, longer
    scaled_width, scaled_height = resized(size, side)
    per_x, per_y = width / scaled_width, height / scaled_height
    left, top = (scaled_width - side) // 2, (scaled_height - side) // 2  # CLIP crops at whole resized pixels
    return left * per_x, top * per_y, side * per_x, side * per_y


def fault(xy_px, size):
    """Say what is wrong with a box or point for an image of `size` = (width, height), or None. Tolerates a millionth."""
    width, height = size
    if not all(math.isfinite(v) for v in xy_px):
        return "not finite"
    if len(xy_px) == 4 and (xy_px[0] > xy_px[2] or xy_px[1] > xy_px[3]):
        return "corners swapped"
    slack = 1e-6 * max(width, height)
    if min(xy_px) < -slack or max(xy_px[0::2]) > width + slack or max(xy_px[1::2]) > height + slack:
        return "outside the image"
    return None


def iou(box_a, box_b):
    """Intersection over union of two boxes in one frame; a box with swapped corners has no area.

    >>> iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    True
    """

    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    both = area(max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3]))
    either = area(*box_a) + area(*box_b) - both
    return both / either if either > 0 else 0.0


@dataclass(frozen=True)
class CoordFormat:
    """One way to write locations: how numbers are formed, and how the image reaches the model's square.

    kind      "nfp"   normalized floating point, 4 decimals   (0.0195, 0.2344, 0.0586, 0.2832)
              "ivb"   integer valued binning, 0..n_bins       (4, 52, 13, 63)
              "diga"  deviation from image-grid based anchor  (0, 4, 3, 11, 6, 0)
    side      of the model's square image in pixels, a multiple of `patch`; also the number of bins
    geometry  "squash", "pad" or "crop", see `window`

    The paper's example, a cat in an image of 512 x 512:

    >>> [CoordFormat(kind).encode_box((10, 120, 30, 145), (512, 512)) for kind in KINDS]
    ['(0.0195, 0.2344, 0.0586, 0.2832)', '(4, 52, 13, 63)', '(0, 4, 3, 11, 6, 0)']
    >>> CoordFormat("ivb").decode_boxes("It is located at [4,52, 13 ,63].", (448, 224))
    [(8.0, 52.0, 26.0, 63.0)]
    """

    kind: str = "ivb"
    side: int = 224
    geometry: str = "squash"
    patch: int = PATCH

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"coordinate kind {self.kind!r}; expected one of {KINDS}; nfp, ivb and diga are the paper's"
            )
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry {self.geometry!r}; expected one of {GEOMETRIES}; squash is the default")
        if not isinstance(self.side, int) or self.patch < 1 or self.side < self.patch or self.side % self.patch:
            raise ValueError(
                f"side {self.side}; expected a multiple of the patch size {self.patch}; use 224 or 336 for the paper's models"
            )

    @property
    def n_bins(self):
        return self.side

    @property
    def grid(self):
        """Anchor cells along each axis: CLIP's patches, 16 at 224 px and 24 at 336 px."""
        return self.side // self.patch

    # ----- pixels <-> the model's square

    def unit_from_px(self, xy_px, size):
        """Map a box or point from original pixels to fractions of the model's square (may leave [0, 1] under crop)."""
        left, top, width, height = window(size, self.geometry, self.side)  # below: x at even places, y at odd ones
        return tuple((v - (top if i % 2 else left)) / (height if i % 2 else width) for i, v in enumerate(xy_px))

    def px_from_unit(self, xy_unit, size):
        """Map a box or point from fractions of the model's square to original pixels: the inverse of `unit_from_px`."""
        left, top, width, height = window(size, self.geometry, self.side)
        return tuple(v * (height if i % 2 else width) + (top if i % 2 else left) for i, v in enumerate(xy_unit))

    def visible(self, box_px, size):
        """Say which fraction of a box's area the model's square shows: 1.0 except under crop."""
        x1, y1, x2, y2 = self.unit_from_px(box_px, size)
        area = (x2 - x1) * (y2 - y1)
        shown = max(0.0, min(x2, 1) - max(x1, 0)) * max(0.0, min(y2, 1) - max(y1, 0))
        return shown / area if area > 0 else float(0 <= x1 <= 1 and 0 <= y1 <= 1)

    # ----- to text

    def encode_box(self, box_px, size):
        """Write a box. Under crop, the part that is seen. Raises ValueError for a box that is not one in this image."""
        box_unit = self._checked(box_px, size, 4)
        if min(box_unit[2:]) < 0 or max(box_unit[:2]) > 1:
            raise ValueError(
                f"box {tuple(box_px)} is outside the {self.geometry} of an image of size {size}; "
                "expected some of it inside; drop it, or use geometry squash or pad"
            )
        box_unit = tuple(min(max(0.0, v), 1.0) for v in box_unit)  # max(0.0, v): -0.0 becomes 0.0
        if self.kind == "nfp":
            return _text(box_unit, ".4f")
        x1, y1, x2, y2 = box_bins = self._bins(box_unit)
        if self.kind == "ivb":
            return _text(box_bins)
        p, q, ax, ay = self._anchor((box_unit[0] + box_unit[2]) / 2, (box_unit[1] + box_unit[3]) / 2)
        # left, top, right, bottom distances, as FCOS: the only signs that give the example of App. A. Taken from the
        # integers of IVB, so that decoding gives IVB's box exactly; negative where a thin box misses its anchor.
        return _text((p, q, ax - x1, ay - y1, x2 - ax, y2 - ay))

    def encode_point(self, point_px, size):
        """Write a point, usually a box's centre. Raises ValueError for a point outside the image or its crop."""
        point_unit = self._checked(point_px, size, 2)
        if not all(-1e-6 <= v <= 1 + 1e-6 for v in point_unit):
            raise ValueError(
                f"point {tuple(point_px)} is outside the {self.geometry} of an image of size {size}; "
                "expected it inside; drop it, or use geometry squash or pad"
            )
        point_unit = tuple(min(max(0.0, v), 1.0) for v in point_unit)
        if self.kind == "nfp":
            return _text(point_unit, ".4f")
        cx, cy = self._bins(point_unit)
        if self.kind == "ivb":
            return _text((cx, cy))
        p, q, ax, ay = self._anchor(*point_unit)
        return _text((p, q, cx - ax, cy - ay))  # the paper gives no DIGA point; this is our reading

    def _checked(self, xy_px, size, length):
        """Refuse what is not a location in original pixels; return it in fractions of the model's square."""
        what = "box (x1, y1, x2, y2)" if length == 4 else "point (x, y)"
        width, height = size
        if not (width > 0 and height > 0):
            raise ValueError(f"image size {size}; expected (width, height) in pixels; read it from the image file")
        xy_px = tuple(float(v) for v in xy_px)
        if len(xy_px) != length:
            raise ValueError(
                f"{len(xy_px)} numbers {xy_px}; expected a {what}; COCO's (x, y, w, h) must be converted first"
            )
        wrong = fault(xy_px, size)
        if wrong:
            raise ValueError(
                f"{xy_px} is {wrong}; expected a {what} in pixels of an image of size {size}; fix or drop it"
            )
        if max(xy_px) <= 1 < min(size) and any(v % 1 for v in xy_px):
            raise ValueError(
                f"{xy_px} looks like fractions; expected a {what} in pixels of an image of size {size}; "
                "multiply by width and height"
            )
        return self.unit_from_px(xy_px, size)

    def _bins(self, xy_unit):
        """Fractions to the nearest integers 0..n_bins, ties to even: App. A has 52.5 -> 52. A tie is one to 9 decimals."""
        return tuple(round(round(v * self.n_bins, 9)) for v in xy_unit)

    def _anchor(self, x_unit, y_unit):
        """Give the cell (p, q) that a point falls in, and the cell's centre (ax, ay) in bins."""
        p, q = (min(int(round(v * self.n_bins, 9) // self.patch), self.grid - 1) for v in (x_unit, y_unit))
        return p, q, p * self.patch + self.patch // 2, q * self.patch + self.patch // 2

    # ----- from text

    def decode_boxes(self, text, size):
        """Read every box in what a model wrote, in original pixels; [] where there is none. Never raises.

        Brackets may be () or [], numbers may carry signs and decimals, prose may surround them. Nothing is clamped:
        a box that is swapped or lies outside the image comes back as written, and `fault` names what is wrong.
        """
        boxes_px = []
        for numbers in _read(text, 6 if self.kind == "diga" else 4):
            if self.kind == "diga":
                ax, ay = (n * self.patch + self.patch // 2 for n in numbers[:2])
                left, top, right, bottom = numbers[2:]
                numbers = (ax - left, ay - top, ax + right, ay + bottom)
            boxes_px.append(self._px_from_numbers(numbers, size))
        return boxes_px

    def decode_points(self, text, size):
        """Read every point in what a model wrote, as `decode_boxes` reads boxes."""
        points_px = []
        for numbers in _read(text, 4 if self.kind == "diga" else 2):
            if self.kind == "diga":
                numbers = tuple(
                    n * self.patch + self.patch // 2 + d for n, d in zip(numbers[:2], numbers[2:], strict=True)
                )
            points_px.append(self._px_from_numbers(numbers, size))
        return points_px

    def _px_from_numbers(self, numbers, size):
        scale = 1 if self.kind == "nfp" else self.n_bins
        return self.px_from_unit(tuple(n / scale for n in numbers), size)


def _text(numbers, spec="d"):
    return "(" + ", ".join(format(n, spec) for n in numbers) + ")"


def _read(text, count):
    """Find every bracket that holds exactly `count` numbers below a billion, separated by commas or spaces."""
    between = r"(?:\s*,\s*|\s+)"
    pattern = r"[(\[]\s*" + between.join([_NUMBER] * count) + r"\s*[)\]]"
    found = (tuple(float(n) for n in match.groups()) for match in re.finditer(pattern, text))
    return [numbers for numbers in found if all(abs(n) < 1e9 for n in numbers)]
