"""Boxes as text: the paper's example to the letter, and no box that text moves by more than its rounding."""

import itertools
import math
import random
import time

import pytest

from coords import GEOMETRIES, KINDS, CoordFormat, fault, iou, window

CAT, SIZE = (10, 120, 30, 145), (512, 512)  # App. A: its box and its image
CENTRE = (20, 132.5)
SIZES = [(512, 512), (640, 480), (333, 500), (501, 37), (17, 400), (2, 3), (1, 1), (1, 300), (4001, 2999)]
FORMATS = [
    CoordFormat(kind, side, geometry) for kind, side, geometry in itertools.product(KINDS, (224, 336, 112), GEOMETRIES)
]


# ----- the paper's numbers


@pytest.mark.parametrize(
    "kind, side, box, point",
    [
        ("nfp", 224, "(0.0195, 0.2344, 0.0586, 0.2832)", "(0.0391, 0.2588)"),
        ("nfp", 336, "(0.0195, 0.2344, 0.0586, 0.2832)", "(0.0391, 0.2588)"),
        ("ivb", 224, "(4, 52, 13, 63)", "(9, 58)"),
        ("ivb", 336, "(7, 79, 20, 95)", "(13, 87)"),
        ("diga", 224, "(0, 4, 3, 11, 6, 0)", "(0, 4, 2, -5)"),
        ("diga", 336, "(0, 6, 0, 12, 13, 4)", "(0, 6, 6, -4)"),
    ],
)
def test_the_cat_of_appendix_a_is_written_as_in_the_paper(kind, side, box, point):
    """224 is the paper's own example; 336 follows by its arithmetic. A point bins the centre, not the binned box's centre."""
    fmt = CoordFormat(kind, side)
    assert fmt.encode_box(CAT, SIZE) == box
    assert fmt.encode_point(CENTRE, SIZE) == point


def test_bins_and_anchors_follow_the_image_side():
    """224 px is 224 bins and 16 x 16 anchors, 336 px is 336 and 24 x 24, and any multiple of the patch will do."""
    assert [(CoordFormat("ivb", side).representation.n_bins, CoordFormat("ivb", side).representation.grid) for side in (112, 224, 336)] == [
        (112, 8),
        (224, 16),
        (336, 24),
    ]


def test_a_half_rounds_to_even():
    """App. A takes 52.5 to 52, and 0.5 to 0 with it: Python's round."""
    assert CoordFormat("ivb").encode_box((0.5, 1.5, 2.5, 3.5), (224, 224)) == "(0, 2, 2, 4)"


def test_both_ends_of_the_bins_are_used():
    """Integers 0 to n_bins, both included; NFP may say 1.0000, never -0.0000; the last anchor is grid - 1."""
    assert CoordFormat("nfp").encode_point((-0.0, 480), (640, 480)) == "(0.0000, 1.0000)"
    assert CoordFormat("ivb").encode_box((0, 0, 640, 480), (640, 480)) == "(0, 0, 224, 224)"
    assert CoordFormat("nfp").encode_box((0, 0, 640, 480), (640, 480)) == "(0.0000, 0.0000, 1.0000, 1.0000)"
    assert CoordFormat("diga").encode_point((640, 480), (640, 480)) == "(15, 15, 7, 7)"
    assert CoordFormat("diga", 336).encode_point((640, 480), (640, 480)) == "(23, 23, 7, 7)"


def test_the_two_axes_are_scaled_apart():
    """x is a share of the width and y of the height, whatever the shape of the image."""
    assert CoordFormat("ivb").encode_box((112, 112, 224, 224), (448, 224)) == "(56, 112, 112, 224)"


def test_a_thin_box_misses_its_anchor_and_diga_says_so_with_a_sign():
    """Distances are left, top, right, bottom from the anchor (FCOS): a box left of its anchor's centre has a negative right one."""
    text = CoordFormat("diga").encode_box((0, 0, 4, 4), (224, 224))
    assert text == "(0, 0, 7, 7, -3, -3)"
    assert CoordFormat("diga").decode_boxes(text, (224, 224)) == [(0, 0, 4, 4)]


def test_diga_decodes_to_exactly_the_box_of_ivb():
    """Its deviations are taken from IVB's integers, so the two say the same box."""
    rng = random.Random(1)
    for _ in range(500):
        size = rng.choice(SIZES[:5])
        box = draw_box(rng, size)
        boxes = [fmt.decode_boxes(fmt.encode_box(box, size), size) for fmt in (CoordFormat("ivb"), CoordFormat("diga"))]
        assert boxes[0] == boxes[1]


# ----- there and back


def draw_box(rng, size):
    """A box in `size`: whole or fractional pixels, sometimes without area, sometimes to the very edge."""

    def span(length):
        if rng.random() < 0.1:
            return 0, length
        a, b = sorted((rng.uniform(0, length), rng.uniform(0, length)))
        return (a, b) if rng.random() < 0.6 else (math.floor(a), math.floor(b))

    (x1, x2), (y1, y2) = span(size[0]), span(size[1])
    if max(x1, y1, x2, y2) <= 1:  # would be taken for fractions
        return 0, 0, *size
    return x1, y1, x2, y2


def assert_survives(fmt, xy_px, size):
    """Write a box or point and read it back: within half a bin of the model's square, for NFP half its last decimal.

    Under crop what is compared is the part that the square shows; what it does not show at all is refused.
    """
    box = len(xy_px) == 4
    xy_unit = fmt.unit_from_px(xy_px, size)
    clipped = tuple(min(max(v, 0), 1) for v in xy_unit)
    try:
        text = (fmt.encode_box if box else fmt.encode_point)(xy_px, size)
    except ValueError:
        assert fmt.geometry == "crop" and clipped != xy_unit, (fmt, xy_px, size)
        return False
    found = (fmt.decode_boxes if box else fmt.decode_points)(text, size)
    assert len(found) == 1, (fmt, text)
    limit = 0.5e-4 if fmt.kind == "nfp" else 0.5 / fmt.side
    error = max(abs(a - b) for a, b in zip(fmt.unit_from_px(found[0], size), clipped, strict=True))
    assert error <= limit * (1 + 1e-6), (fmt, xy_px, size, text, error)
    return True


def test_a_box_survives_text_within_half_a_bin():
    """Six forms, three geometries, three sides, odd and narrow images, thousands of boxes; most of them are written, not refused."""
    rng, written = random.Random(0), 0
    for turn in range(9000):
        fmt, size = FORMATS[turn % len(FORMATS)], rng.choice(SIZES)
        x1, y1, x2, y2 = box = draw_box(rng, size)
        written += assert_survives(fmt, box, size)
        if max(centre := ((x1 + x2) / 2, (y1 + y2) / 2)) > 1:
            written += assert_survives(fmt, centre, size)
    assert written > 13000


def test_no_box_that_hypothesis_can_think_of_is_moved_by_text():
    """The same property, hunted for: runs where the package hypothesis is installed."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    share = st.floats(0, 1)

    @hypothesis.settings(max_examples=400, deadline=None, database=None)
    @hypothesis.given(
        st.sampled_from(FORMATS), st.integers(2, 5000), st.integers(2, 5000), share, share, share, share, st.booleans()
    )
    def check(fmt, width, height, x1, x2, y1, y2, point):
        (x1, x2), (y1, y2) = sorted((x1 * width, x2 * width)), sorted((y1 * height, y2 * height))
        hypothesis.assume(max(x1, y1) > 1)
        assert_survives(fmt, (x1, y1) if point else (x1, y1, x2, y2), (width, height))

    check()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_and_the_square_are_each_others_inverse(geometry):
    """px_from_unit undoes unit_from_px for every image size."""
    for size in SIZES:
        fmt, box = CoordFormat("ivb", 224, geometry), (0, 0, *size)
        assert fmt.px_from_unit(fmt.unit_from_px(box, size), size) == pytest.approx(box, abs=1e-9 * max(size))


def test_the_square_shows_the_whole_image_or_the_middle_of_it():
    """squash and pad show everything, pad with bars around; crop loses the ends of the longer axis."""
    whole, left_end = (0, 0, 640, 480), (0, 0, 80, 480)
    squash, pad, crop = (CoordFormat("ivb", 240, geometry, patch=16) for geometry in GEOMETRIES)
    assert squash.unit_from_px(whole, (640, 480)) == (0, 0, 1, 1)
    assert pad.unit_from_px(whole, (640, 480)) == (0, 0.125, 1, 0.875)
    assert crop.unit_from_px(whole, (640, 480)) == pytest.approx((-1 / 6, 0, 7 / 6, 1))
    assert [fmt.visible(whole, (640, 480)) for fmt in (squash, pad, crop)] == pytest.approx([1, 1, 0.75])
    assert crop.visible(left_end, (640, 480)) == 0
    with pytest.raises(ValueError, match="outside the crop"):
        crop.encode_box((0, 0, 70, 480), (640, 480))
    with pytest.raises(ValueError, match="outside the crop"):
        crop.encode_point((40, 240), (640, 480))
    assert window((301, 200), "pad", 224)[1] == -50  # 101 spare rows: 50 above, 51 below, as pixels are pasted


# ----- what models write


@pytest.mark.parametrize(
    "text",
    [
        "(4, 52, 13, 63)",
        "[4, 52, 13, 63]",
        "(4,52,13,63)",
        "( 4 52  13\n63 )",
        "[4 ,52, 13 ,63]",
        "(4.0, 52., +13, 63.00)",
        "It is located at (4, 52, 13, 63) bbox.",
        "Sure (really)! [4, 52, 13, 63], I (1) think (2, 3).",
        "((4, 52, 13, 63))",
        "((4, 52, 13, 63",
    ],
)
def test_what_models_really_write_is_read(text):
    """Round or square brackets, any spacing, signs, decimals, prose around; a bracket never closed holds no box."""
    expected = [] if text.endswith("63") else [(4, 52, 13, 63)]
    assert CoordFormat("ivb").decode_boxes(text, (224, 224)) == expected


def test_several_boxes_are_all_read_in_order():
    """One answer may hold several."""
    text = "One at (1, 2, 3, 4) and others at [5, 6, 7, 8](9, 10, 11, 12)."
    assert CoordFormat("ivb").decode_boxes(text, (224, 224)) == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_box_is_an_empty_list(kind):
    """Prose, wrong counts, words for numbers, digits of other scripts, exponents, NaN: no box, and no error."""
    for text in (
        "",
        "There is no such object in the image",
        "(1, 2, 3)",
        "(1, 2, 3, 4, 5, 6, 7)",
        "(a, b, c, d)",
        "(x1,y1,x2,y2) bbox",
        "()",
        "(٤, ٥٢, ١٣, ٦٣)",
        "(①, ②, ③, ④)",
        "(1e3, 2, 3, 4)",
        "(nan, inf, 3, 4)",
        "(1, 2, 3, 4",
        "1, 2, 3, 4",
        "(1,, 2, 3, 4)",
        "(--1, 2, 3, 4)",
        "(1.2.3, 4, 5, 6)",
        "\x00\ud800(",
        "(12, 34, 56, 78",
    ):
        assert CoordFormat(kind).decode_boxes(text, (640, 480)) == []


def test_nothing_is_clamped_and_what_is_wrong_has_a_name():
    """A box outside the image, or swapped, comes back as written; `fault` says what it is."""
    fmt, size = CoordFormat("ivb"), (224, 224)
    outside, swapped, fine = (
        fmt.decode_boxes(text, size)[0] for text in ("(-5, 0, 9999, 10)", "(20, 20, 10, 10)", "(0, 0, 224, 224)")
    )
    assert (outside, fault(outside, size)) == ((-5, 0, 9999, 10), "outside the image")
    assert (swapped, fault(swapped, size)) == ((20, 20, 10, 10), "corners swapped")
    assert fault(fine, size) is None
    assert fault((0, 0, math.nan, 1), size) == "not finite"


@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_of_anything_is_read_in_a_moment(kind):
    """A model that runs away must not hang the evaluation: each text in well under two seconds."""
    n = 1_000_000
    for text in (
        "(" + "1" * n,
        "(" * n,
        "[1" * (n // 2),
        "(" + " " * n,
        "(1" + " " * n,
        "(1 " * (n // 3),
        "1" * n,
        "(" + "1," * (n // 2),
        "(" + "." * n,
        "( " * (n // 2),
        "(" + ", ".join(["1" * (n // 4)] * 4) + "x",
        "(" + ", ".join(["1." + "1" * (n // 6)] * 6) + ")",
        "(" + "- " * (n // 2),
        "(1 , " * (n // 5),
    ):
        started = time.process_time()
        CoordFormat(kind).decode_boxes(text, (640, 480))
        CoordFormat(kind).decode_points(text, (640, 480))
        assert time.process_time() - started < 2, f"{text[:20]!r}..."


def test_random_text_never_raises():
    """Brackets, digits, signs and separators in any order."""
    rng = random.Random(0)
    for turn in range(6000):
        text = "".join(rng.choice("(([[))]]0123456789,,,   ..+-\n\tex\u0663") for _ in range(rng.randint(0, 60)))
        for found in (
            FORMATS[turn % len(FORMATS)].decode_boxes(text, (333, 500)),
            FORMATS[turn % len(FORMATS)].decode_points(text, (333, 500)),
        ):
            assert all(math.isfinite(v) for xy in found for v in xy)


# ----- what is refused


@pytest.mark.parametrize(
    "box, hint",
    [
        ((30, 120, 10, 145), "corners swapped"),
        ((10, 145, 30, 120), "corners swapped"),
        ((10, math.nan, 30, 145), "not finite"),
        ((10, 120, math.inf, 145), "not finite"),
        ((0.02, 0.23, 0.06, 0.28), "multiply by width and height"),
        ((-3, 120, 30, 145), "outside the image"),
        ((10, 120, 513, 145), "outside the image"),
        ((10, 120, 30), "it should be a box"),
        ((10, 120, 30, 145, 1), "it should be a box"),
    ],
)
def test_pixels_are_refused_with_a_hint(box, hint):
    """Swapped corners, NaN, fractions, boxes outside the image, the wrong number of numbers: each by name, in every form."""
    for fmt in FORMATS:
        with pytest.raises(ValueError, match=hint):
            fmt.encode_box(box, SIZE)


@pytest.mark.parametrize(
    "point, hint",
    [
        ((math.nan, 1), "not finite"),
        ((0.5, 0.5), "multiply"),
        ((513, 1), "outside"),
        ((1, 2, 3, 4), "it should be a point"),
    ],
)
def test_points_are_refused_with_a_hint(point, hint):
    """The same for points."""
    for fmt in FORMATS:
        with pytest.raises(ValueError, match=hint):
            fmt.encode_point(point, SIZE)


def test_formats_and_sizes_that_are_none_are_refused():
    """An unknown kind or geometry, a side that is no multiple of the patch, an image without pixels."""
    for options, hint in (
        ({"kind": "bins"}, "coordinate kind 'bins'"),
        ({"geometry": "fit"}, "geometry 'fit'"),
        ({"side": 225}, "side 225"),
        ({"side": 0}, "side 0"),
        ({"side": -14}, "side -14"),
    ):
        with pytest.raises(ValueError, match=hint):
            CoordFormat(**options)
    for size in ((0, 10), (10, -1), (math.nan, 10)):
        with pytest.raises(ValueError, match="image size"):
            CoordFormat("ivb").encode_box((0, 0, 0, 0), size)


def test_iou_of_hand_computed_boxes():
    """Two squares of 4 that share 1 are 1/7 alike; the same box 1; apart, touching or swapped 0."""
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert (
        iou((0, 0, 1, 1), (1, 0, 2, 1))
        == iou((0, 0, 1, 1), (5, 5, 6, 6))
        == iou((2, 2, 0, 0), (0, 0, 2, 2))
        == iou((1, 1, 1, 1), (1, 1, 1, 1))
        == 0
    )


def test_edges_of_what_is_written_and_read():
    """Boxes that crop cuts, ties that floats miss, a corner's whole pixels, several points, huge numbers, the edge's tolerance."""
    crop = CoordFormat("ivb", 240, "crop", patch=16)  # shows x from 80 to 560
    assert crop.encode_box((40, 0, 320, 240), (640, 480)) == "(0, 0, 120, 120)"
    fmt, size = CoordFormat("ivb"), (448, 448)
    assert fmt.encode_box((29, 0, 115, 448), size) == "(14, 0, 58, 224)"  # 14.5 and 57.5
    assert fmt.encode_box((0, 0, 1, 1), size) == "(0, 0, 0, 0)"
    assert fmt.decode_points("(1, 2) or [3, 4]", size) == [(2, 4), (6, 8)]
    assert fmt.decode_points("(1, 9999999999)", size) == []
    assert fault((0, 0, 448.0004, 448), size) is None and fault((0, 0, 448.0005, 448), size) == "outside the image"
