"""Pictures of a stream: what is where, and in which colours."""

import math

import numpy as np
import pytest

from peft_talora.continual.pictures import _apart, _colour, _range, _Table, draw_confusion, draw_course, draw_matrix

NAMES = ["pits", "a long name of a domain", "pills"]
R = [[80.0, 20.0, 10.0], [60.0, 90.0, 15.0], [40.0, 70.0, 95.0]]
FRAME = [224, 130, 20]


def cells(page, rows, columns, right, below):
    """Pixels of the cells of a drawn table, by row and column."""
    table = _Table(rows, columns, right, below)
    assert page.size == (table.page.width // 2, table.page.height // 2)
    pixels = np.asarray(page).astype(int)

    def cell(row, column):
        left, top, width, bottom = (value // 2 for value in table.box(row, column))
        return pixels[top : bottom + 1, left : width + 1]

    return cell


def matrix_cells(values):
    page = draw_matrix(values, NAMES, "IoU")
    return cells(page, [f"after {name}" for name in NAMES[: len(values)]], NAMES, 90, 28)


def corner(cell):
    """The colour inside of the frame, beside the number."""
    return cell[5, 5]


def has_frame(cell):
    return (np.abs(cell - FRAME).sum(-1) < 60).sum() > 100


def test_a_cell_has_the_colour_of_its_score_on_a_scale_of_whole_tens():
    cell = matrix_cells(R)
    for row, column in ((0, 0), (1, 0), (2, 1), (2, 2)):
        expected = _colour((R[row][column] - 10) / 90)
        assert np.abs(corner(cell(row, column)) - expected).max() <= 2


def test_what_was_right_after_training_has_a_frame():
    cell = matrix_cells(R)
    framed = [[bool(has_frame(cell(row, column))) for column in range(3)] for row in range(3)]
    assert framed == np.eye(3, dtype=bool).tolist()


def test_what_was_before_training_is_pale_and_hatched():
    values = np.full((3, 3), 50.0)
    values[1:, 0] = 0, 100  # the ends of the scale
    cell = matrix_cells(values)
    before, after = cell(0, 2), cell(2, 1)
    assert before.mean() > after.mean()
    assert len(np.unique(before[:6].reshape(-1, 3), axis=0)) > len(np.unique(after[:6].reshape(-1, 3), axis=0))


def test_a_stream_under_way_and_scores_that_are_missing():
    cell = matrix_cells([[math.nan, 20.0, 10.0], [60.0, 90.0, 15.0]])
    assert (cell(0, 0)[2:-2, 2:-2] == 255).all()
    draw_matrix([[math.nan]], ["pits"], "nothing is known")
    draw_matrix([[50.0]], ["pits"], "one score")


def test_confusion_shows_shares_of_rows():
    page = draw_confusion([[9, 1, 0, 0], [0, 5, 0, 5], [0, 0, 0, 0]], NAMES, "routes", [*NAMES, "base"])
    cell = cells(page, NAMES, [*NAMES, "base"], 80, 28)
    for (row, column), share in {(0, 0): 0.9, (0, 1): 0.1, (1, 1): 0.5, (1, 3): 0.5, (2, 2): 0}.items():
        assert np.abs(corner(cell(row, column)) - _colour(share)).max() <= 2
    framed = [[bool(has_frame(cell(row, column))) for column in range(4)] for row in range(3)]
    assert framed == np.eye(3, 4, dtype=bool).tolist()
    beside = np.asarray(page)[:, -60:]
    heights = [row // 2 for row in range(2 * 62, 2 * 62 + 3 * 60, 60)]
    written = [bool((beside[top : top + 30] < 100).any()) for top in heights]
    assert written == [True, True, False], "a share of no images is not shown"


def test_scales_begin_and_end_at_the_ends_of_their_colours():
    assert _colour(0).tolist() == [247, 251, 255]
    assert _colour(1).tolist() == [8, 48, 107]
    assert _colour(-1).tolist() == _colour(0).tolist()
    lightness = [_colour(share).sum() for share in np.linspace(0, 1, 20)]
    assert lightness == sorted(lightness, reverse=True)


@pytest.mark.parametrize(
    ("scores", "ends"),
    [
        ([3.2, 4.1], (3, 5, 1)),
        ([3.0, 3.0], (3, 4, 1)),
        ([41.0, 79.0], (40, 80, 10)),
        ([-4.0, 96.0], (-20, 100, 20)),
        ([], (0, 100, 20)),
    ],
)
def test_axes_hold_the_scores_between_ticks(scores, ends):
    assert _range(scores) == ends


def test_labels_keep_their_order_and_distance():
    wanted = [100.0, 10.0, 12.0, 11.0, 50.0]
    placed = _apart(wanted, 5)
    assert [placed[0], placed[4]] == [100, 50], "what is alone stays"
    assert placed[1:4] == [6, 16, 11], "what is close stands around its middle"
    chain = _apart([0.0, 4.0, 8.0, 8.5], 5)
    assert np.diff(chain) == pytest.approx([5, 5, 5])


def test_a_course_falls_where_scores_do():
    curves = {"falling": [90.0, 60.0, 30.0], "late": [math.nan, math.nan, 80.0]}
    page = np.asarray(draw_course(curves, NAMES, "IoU")).astype(int)
    blank = np.asarray(draw_course({"falling": [math.nan] * 3, "late": [math.nan] * 3}, NAMES, "IoU"))
    assert page.shape == blank.shape
    coloured = np.ptp(page, axis=-1) > 60
    columns = np.argwhere(coloured.any(0))[:, 0]
    rows = [np.argwhere(coloured[:, column])[:, 0].mean() for column in columns[:40]]
    assert rows[-1] > rows[0] + 10, "down to the right"
    assert not (np.ptp(blank.astype(int), axis=-1) > 60).any(), "nothing without scores"


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"R: got shape \(1, 2\); 3 names need \(1 to 3, 3\)"):
        draw_matrix([[1.0, 2.0]], NAMES, "")
    with pytest.raises(ValueError, match=r"R: got shape \(2, 1\)"):
        draw_matrix([[1.0], [2.0]], ["pits"], "")
    with pytest.raises(ValueError, match=r"counts: got shape \(1, 2\).* shape \(3, 3\)"):
        draw_confusion([[1, 2]], NAMES, "")
    with pytest.raises(ValueError, match="least -1"):
        draw_confusion([[-1]], ["pits"], "")
    with pytest.raises(ValueError, match="curves: 'iou' has 2 scores; there are 3 stages"):
        draw_course({"iou": [1.0, 2.0]}, NAMES, "")
