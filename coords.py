"""Boxes as text, and text as boxes (LocVLM, Sec. 3.2 and App. A).

A box is (x1, y1, x2, y2): top-left corner, then bottom-right corner, x to the right, y down. A point is (x, y).
A name ends with its frame (box_px, point_px, or xy_px for either):

    _px    pixels of the ORIGINAL image, floats in [0, W] x [0, H]
    _unit  fractions of the MODEL's square input image, floats in [0, 1]
    _bins  the same square in integers 0..n_bins, both ends included: what IVB text holds

`CoordFormat` takes box_px to text and back. A geometry turns pixels into fractions of the model's square (`window` is the
rectangle that `clip_vit.preprocess` shows there), and a representation turns fractions into the numbers in the text.
"""

import math
import re
from dataclasses import dataclass

GEOMETRIES = ("squash", "pad", "crop")

_NUMBER = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"  # digits match in one way only: a megabyte of them costs no backtracking


# ----- geometry: pixels of the image <-> the model's square


def resized(size, side):
    """Return (width, height) after the shorter edge became `side`: CLIP's resize before the centre crop.

    >>> resized((640, 480), 224)
    (298, 224)
    """
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def window(size, geometry, side):
    """Return (left, top, width, height), in pixels of the original image, of what the model's square shows.

    squash  the whole image, its two axes scaled separately (the paper's arithmetic)
    pad     the square around the centred image (LLaVA-1.5): reaches outside the image
    crop    the square in the middle of the image (CLIP, LLaVA v1): cuts the ends of the longer axis

    >>> window((640, 480), "squash", 224), window((640, 480), "pad", 224), window((640, 480), "crop", 240)
    ((0, 0, 640, 480), (0, -80, 640, 640), (80.0, 0.0, 480.0, 480.0))
    """
    width, height = size
    if geometry not in GEOMETRIES:
        raise ValueError(f"unknown geometry {geometry!r}; choose one of {GEOMETRIES}")
    if geometry == "squash":
        return 0, 0, width, height
    if geometry == "pad":
        longer = max(width, height)
        return -((longer - width) // 2), -((longer - height) // 2), longer, longer
    scaled_width, scaled_height = resized(size, side)
    per_x, per_y = width / scaled_width, height / scaled_height
    left, top = (scaled_width - side) // 2, (scaled_height - side) // 2  # CLIP crops at whole pixels of the resized image
    return left * per_x, top * per_y, side * per_x, side * per_y


def fault(xy_px, size):
    """Return the problem of a box or point in an image of (width, height), or None. Tolerance: 1e-6 of its longer side."""
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
    """Return the intersection over union of two boxes in one frame. A box with swapped corners has no area.

    >>> iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    True
    """

    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    both = area(max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3]))
    either = area(*box_a) + area(*box_b) - both
    return both / either if either > 0 else 0.0


# ----- representations: fractions of the square <-> the numbers in the text


class NFP:
    """Normalized floating point: the fractions themselves. (0.0195, 0.2344, 0.0586, 0.2832)

    Also the base of the other classes, which all have: `number` (how a number is printed), `extra` (how many numbers the text
    holds beyond the 4 of a box or the 2 of a point), encode and decode (inverse up to rounding).
    """

    number = ".4f"
    extra = 0

    def __init__(self, side, patch):
        self.n_bins, self.patch, self.grid = side, patch, side // patch

    def encode(self, xy_unit):
        """Turn a box or point in [0, 1] into the numbers to print."""
        return xy_unit

    def decode(self, numbers):
        """Turn numbers from a text into a box or point, as fractions: the inverse of `encode`."""
        return numbers


class IVB(NFP):
    """Integer valued binning: the nearest of the integers 0..n_bins. (4, 52, 13, 63)"""

    number = "d"

    def encode(self, xy_unit):
        # ties to even: App. A has 52.5 -> 52. Rounding to 9 decimals first, so that float noise cannot break a tie
        return tuple(round(round(v * self.n_bins, 9)) for v in xy_unit)

    def decode(self, numbers):
        return tuple(n / self.n_bins for n in numbers)


class DIGA(IVB):
    """Deviation from image-grid based anchor: the patch that holds the centre, then deviations from its centre, in bins.

    A box is (p, q, left, top, right, bottom), as FCOS: only these signs reproduce the example of App. A, (0, 4, 3, 11, 6, 0). A
    point is (p, q, dx, dy), our reading: the paper has none. Deviations are differences of IVB's integers, so decoding gives
    exactly IVB's box; they are negative if a thin box misses its anchor.
    """

    extra = 2
    signs = {2: (1, 1), 4: (-1, -1, 1, 1)}  # of the deviations of a point, and of a box

    def encode(self, xy_unit):
        xy_bins = super().encode(xy_unit)
        centre = [(low + high) / 2 for low, high in zip(xy_unit[:2], xy_unit[-2:], strict=True)]  # a point: the same two
        anchor = [min(int(round(v * self.n_bins, 9) // self.patch), self.grid - 1) for v in centre]
        ax, ay = (n * self.patch + self.patch // 2 for n in anchor)  # the cell's centre, in bins
        return (*anchor, *(s * (v - a) for s, v, a in zip(self.signs[len(xy_unit)], xy_bins, (ax, ay, ax, ay), strict=False)))

    def decode(self, numbers):
        ax, ay = (n * self.patch + self.patch // 2 for n in numbers[:2])
        deviations = zip((ax, ay, ax, ay), self.signs[len(numbers) - 2], numbers[2:], strict=False)
        return super().decode(tuple(a + s * d for a, s, d in deviations))


REPRESENTATIONS = {"nfp": NFP, "ivb": IVB, "diga": DIGA}
KINDS = tuple(REPRESENTATIONS)


# ----- pixels <-> text


@dataclass(frozen=True)
class CoordFormat:
    """One way to write locations: a representation, and how the image becomes the model's square.

    kind      a key of REPRESENTATIONS
    side      of the model's square image in pixels, a multiple of `patch`; also the number of bins
    geometry  "squash", "pad" or "crop", see `window`
    patch     side of the tower's patches in pixels: DIGA's anchor cells, 16 x 16 of them at 224 px
    Its attribute `representation`, made from these, turns fractions into numbers and back.

    The paper's example, a cat in an image of 512 x 512:

    >>> [CoordFormat(kind).encode_box((10, 120, 30, 145), (512, 512)) for kind in ("nfp", "ivb", "diga")]
    ['(0.0195, 0.2344, 0.0586, 0.2832)', '(4, 52, 13, 63)', '(0, 4, 3, 11, 6, 0)']
    >>> CoordFormat("ivb").decode_boxes("It is located at [4,52, 13 ,63].", (448, 224))
    [(8.0, 52.0, 26.0, 63.0)]
    """

    kind: str = "ivb"
    side: int = 224
    geometry: str = "squash"
    patch: int = 14  # CLIP ViT-L/14's

    def __post_init__(self):
        if self.kind not in REPRESENTATIONS:
            raise ValueError(f"unknown coordinate kind {self.kind!r}; choose one of {KINDS}")
        if not isinstance(self.side, int) or self.patch < 1 or self.side < self.patch or self.side % self.patch:
            raise ValueError(f"side {self.side} is not a multiple of the patch size {self.patch}, such as {16 * self.patch}")
        window((1, 1), self.geometry, self.side)  # raises if the geometry is unknown
        object.__setattr__(self, "representation", REPRESENTATIONS[self.kind](self.side, self.patch))

    def unit_from_px(self, xy_px, size):
        """Map a box or point from original pixels to fractions of the model's square (outside [0, 1] where crop cuts)."""
        left, top, width, height = window(size, self.geometry, self.side)  # below: x at even places, y at odd ones
        return tuple((v - (top if i % 2 else left)) / (height if i % 2 else width) for i, v in enumerate(xy_px))

    def px_from_unit(self, xy_unit, size):
        """Map a box or point from fractions of the model's square to original pixels: the inverse of `unit_from_px`."""
        left, top, width, height = window(size, self.geometry, self.side)
        return tuple(v * (height if i % 2 else width) + (top if i % 2 else left) for i, v in enumerate(xy_unit))

    def visible(self, box_px, size):
        """Return which fraction of a box's area the model's square shows: 1.0, or less under crop."""
        x1, y1, x2, y2 = self.unit_from_px(box_px, size)
        area = (x2 - x1) * (y2 - y1)
        shown = max(0.0, min(x2, 1) - max(x1, 0)) * max(0.0, min(y2, 1) - max(y1, 0))
        return shown / area if area > 0 else float(0 <= x1 <= 1 and 0 <= y1 <= 1)

    def encode_box(self, box_px, size):
        """Write a box; under crop, its visible part. Raise ValueError if it is no box of this image."""
        box_unit = self._checked(box_px, size, 4)
        if min(box_unit[2:]) < 0 or max(box_unit[:2]) > 1:
            raise ValueError(self._outside("box", box_px, size))
        return self._write(box_unit)

    def encode_point(self, point_px, size):
        """Write a point, usually a box's centre. Raise ValueError if it lies outside the image or its crop."""
        point_unit = self._checked(point_px, size, 2)
        if not all(-1e-6 <= v <= 1 + 1e-6 for v in point_unit):
            raise ValueError(self._outside("point", point_px, size))
        return self._write(point_unit)

    def decode_boxes(self, text, size):
        """Read every box in a model's text, in original pixels: a list, perhaps empty. Never raises.

        Brackets may be () or [], numbers may carry signs and decimals, prose may surround them. Nothing is clamped:
        a box with swapped corners or outside the image comes back as written, and `fault` names its problem.
        """
        return self._decode(text, size, 4)

    def decode_points(self, text, size):
        """Read every point in a model's text, as `decode_boxes` reads boxes."""
        return self._decode(text, size, 2)

    def _write(self, xy_unit):
        numbers = self.representation.encode(tuple(min(max(0.0, v), 1.0) for v in xy_unit))  # max(0.0, v): no -0.0
        return "(" + ", ".join(format(n, self.representation.number) for n in numbers) + ")"

    def _decode(self, text, size, length):
        """Find every bracket of the right count of numbers, each below a billion, separated by commas or spaces."""
        count = length + self.representation.extra
        pattern = r"[(\[]\s*" + r"(?:\s*,\s*|\s+)".join([_NUMBER] * count) + r"\s*[)\]]"
        found = (tuple(float(n) for n in match.groups()) for match in re.finditer(pattern, text))
        usable = (numbers for numbers in found if all(abs(n) < 1e9 for n in numbers))
        return [self.px_from_unit(self.representation.decode(numbers), size) for numbers in usable]

    def _outside(self, what, xy_px, size):
        return f"{what} {tuple(xy_px)} is outside the {self.geometry} of an image of size {size}; use geometry squash or pad"

    def _checked(self, xy_px, size, length):
        """Return a location in original pixels as fractions of the model's square. Raise ValueError if it is invalid."""
        what, other = ("box (x1, y1, x2, y2)", ", not COCO's x, y, w, h") if length == 4 else ("point (x, y)", "")
        width, height = size
        if not (width > 0 and height > 0):
            raise ValueError(f"image size {size} is not (width, height) in pixels")
        xy_px = tuple(float(v) for v in xy_px)
        if len(xy_px) != length:
            raise ValueError(f"{xy_px} has {len(xy_px)} numbers; it should be a {what}")
        if problem := fault(xy_px, size):
            raise ValueError(f"{xy_px}: {problem}; it should be a {what} in pixels of an image of size {size}{other}")
        if max(xy_px) <= 1 < min(size) and any(v % 1 for v in xy_px):
            raise ValueError(f"{xy_px} looks like fractions; multiply by width and height: a {what} is in pixels of {size}")
        return self.unit_from_px(xy_px, size)
