"""Prompts from masks: against brute force, by hand, and in distribution."""

import pytest
import torch

from peft_talora.prompts import central_points, jitter_boxes, mask_boxes, mask_iou, random_points, regions

NEEDS_A_PIXEL = pytest.mark.parametrize(
    "make", [mask_boxes, central_points, lambda masks: random_points(masks, torch.Generator())]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_masks(share=0.1, number=40, size=(9, 13)):
    """Masks that are not empty and mostly touch borders; not square, so that a swapped axis fails."""
    masks = torch.rand(number, *size, generator=generator(1)) < share
    masks[:, 3, 4] |= ~masks.flatten(1).any(1)
    return masks


def flood(labels, ignored=None, least=1):
    """The regions as sets of (row, column), in the order of their first pixels."""
    H, W = labels.shape
    seen, found = set(), []
    for start in [(y, x) for y in range(H) for x in range(W)]:
        if start in seen or labels[start] == ignored:
            continue
        region, front = {start}, [start]
        while front:
            y, x = front.pop()
            for place in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= place[0] < H and 0 <= place[1] < W
                if inside and place not in region and labels[place] == labels[start]:
                    region.add(place)
                    front.append(place)
        seen |= region
        found.append(region)
    return [region for region in found if len(region) >= least]


def as_sets(masks):
    return [{tuple(place) for place in mask.nonzero().tolist()} for mask in masks]


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (2, 3), (11, 14)])
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_regions_are_those_of_a_flood_fill(size, classes, dtype):
    for seed in range(4):
        labels = torch.randint(classes, size, generator=generator(seed)).to(dtype)
        for ignored, least in ((None, 1), (0, 1), (None, 3), (1, 2)):
            found = regions(labels, ignored, least)
            assert found.dtype == torch.bool
            assert found.shape[1:] == size
            sizes = found.sum((1, 2)).tolist()
            assert sizes == sorted(sizes, reverse=True)
            expected = flood(labels, ignored, least)
            assert sorted(map(sorted, as_sets(found))) == sorted(map(sorted, expected))


def test_a_region_winds_through_the_whole_map():
    snake = torch.zeros(21, 16, dtype=torch.int64)
    snake[::2] = 1
    snake[1::4, -1] = 1
    snake[3::4, 0] = 1
    assert as_sets(regions(snake, ignored=0)) == flood(snake, ignored=0)
    assert regions(snake, ignored=0).shape[0] == 1


def test_regions_that_touch_by_a_corner_are_two():
    assert len(regions(torch.eye(2, dtype=torch.int64))) == 4


def test_without_regions_there_are_none():
    assert regions(torch.full((3, 5), 255), ignored=255).shape == (0, 3, 5)


def test_a_box_is_the_smallest_around_its_mask():
    masks = random_masks(0.03)
    for mask, box in zip(masks, mask_boxes(masks).tolist(), strict=True):
        rows, columns = mask.nonzero().T
        assert box == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_boxes_of_a_pixel_a_border_and_the_whole_image():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 2, 6] = True
    masks[1, 4, 1:] = True
    masks[2] = True
    assert mask_boxes(masks).tolist() == [[6, 2, 6, 2], [1, 4, 6, 4], [0, 0, 6, 4]]


@pytest.mark.parametrize("make", [central_points, lambda masks: random_points(masks, generator())])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.1])
def test_points_lie_in_their_masks(make, share):
    masks = random_masks(share)
    points = make(masks)
    assert points.dtype == torch.float32
    x, y = points.long().T
    assert torch.equal(points, torch.stack([x, y], 1).float())
    assert masks[torch.arange(len(masks)), y, x].all()


@NEEDS_A_PIXEL
def test_an_empty_mask_is_named(make):
    masks = random_masks(0.5, number=4)
    masks[2] = False
    with pytest.raises(ValueError, match="mask 2 of 4 is empty"):
        make(masks)


@NEEDS_A_PIXEL
def test_no_masks_give_no_prompts(make):
    assert len(make(torch.zeros(0, 5, 7, dtype=torch.bool))) == 0


def test_all_pixels_of_a_mask_are_equally_likely():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 1] = mask[3, 2:4] = mask[2, 5] = True
    x, y = random_points(mask.expand(8000, -1, -1), generator()).long().T
    counts = torch.zeros(4, 6).index_put((y, x), torch.ones(8000), accumulate=True)
    assert torch.equal(counts > 0, mask)
    torch.testing.assert_close(counts[mask], torch.full((4,), 2000.0), atol=160, rtol=0)  # four standard deviations


def central(rows):
    """The central point of a mask that is drawn with `#`."""
    mask = torch.tensor([[character == "#" for character in row] for row in rows])
    return central_points(mask[None])[0].tolist()


@pytest.mark.parametrize(
    ("rows", "point"),
    [
        (["#######"] * 5, [3, 2]),  # the border of the image is an outline: in depth 3 only row 2, columns 2 to 4
        (["..###", "..###", "..###"], [3, 1]),
        (["#...", "####", "####", "####"], [1, 2]),  # depth 2 at (1, 2) and (2, 2): equally near to their mean
        (["###......", "###......", "#########", "........."], [1, 1]),  # not the mean of the mask
        (["#.......#", ".........", ".........", "........."], [0, 0]),
        (["#####.", "#####.", "##.##.", "#####.", "#####."], [2, 1]),  # round a hole: its upper neighbour
        ([".....", "...#."], [3, 1]),
    ],
)
def test_the_central_point_by_hand(rows, point):
    assert central(rows) == point


def test_the_central_point_is_the_deepest_by_brute_force():
    masks = random_masks(0.85, number=20)
    points = central_points(masks).long()
    for mask, (x, y) in zip(masks, points.tolist(), strict=True):
        H, W = mask.shape

        def depth(row, column, mask=mask, H=H, W=W):
            radius = 0
            while (
                radius <= min(row, column, H - 1 - row, W - 1 - column)
                and mask[row - radius : row + radius + 1, column - radius : column + radius + 1].all()
            ):
                radius += 1
            return radius

        assert depth(y, x) == max(depth(*place) for place in mask.nonzero().tolist())


def test_jitter_is_a_share_of_each_side_and_turns_no_box_inside_out():
    box, sides = torch.tensor([10.0, 20.0, 50.0, 30.0]), torch.tensor([40.0, 10.0, 40.0, 10.0])
    moved = jitter_boxes(box.expand(20000, -1), generator()) - box
    assert (moved.abs() <= 0.2 * sides + 1e-4).all()
    deviation = 0.9594  # of a standard normal variable that is clamped to ±2
    torch.testing.assert_close(moved.std(0) / sides, torch.full((4,), 0.1 * deviation), atol=0, rtol=0.02)
    torch.testing.assert_close(moved.mean(0) / sides, torch.zeros(4), atol=3e-3, rtol=0)
    torch.testing.assert_close(moved.T.corrcoef(), torch.eye(4), atol=0.03, rtol=0)


def test_jitter_of_another_share_and_none():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert torch.equal(jitter_boxes(boxes, generator(), share=0), boxes)
    small, large = (jitter_boxes(boxes, generator(), share) - boxes for share in (0.1, 0.3))
    torch.testing.assert_close(3 * small, large)
    assert not large[1].any()  # a pixel has no side


def test_iou_by_hand_also_of_empty_masks():
    empty, full = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    row = full.clone()
    row[1] = False
    column = full.clone()
    column[:, 1:] = False
    masks, targets = torch.stack([empty, empty, full, row, row]), torch.stack([empty, full, full, full, column])
    iou = mask_iou(masks, targets)
    assert iou.dtype == torch.float32
    torch.testing.assert_close(iou, torch.tensor([1, 0, 1, 1 / 2, 1 / 4]))
    assert torch.equal(iou, mask_iou(targets, masks))


def test_iou_broadcasts():
    masks, targets = random_masks(0.4, 6).view(2, 3, 9, 13), random_masks(0.6, 2)
    iou = mask_iou(masks, targets[:, None])
    assert iou.shape == (2, 3)
    assert iou[1, 2] == mask_iou(masks[1, 2][None], targets[1][None])[0]
