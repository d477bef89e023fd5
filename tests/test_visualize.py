"""Color goes where the mask is, as strong as the opacity; sheets have titles and even tiles."""

import numpy as np
import pytest
import torch
from PIL import Image

from boxteacher.visualize import MAX_WIDTH, TILE, contact_sheet, draw_instances, instance_color

NAMES = ["star", "ring"]


def gray(height=60, width=80):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def square_mask(height=60, width=80):
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, 20:40, 30:60] = True
    return mask


def change(image, picture):
    """Largest change of any channel, per pixel."""
    before = image.permute(1, 2, 0).numpy().astype(int)
    return np.abs(np.array(picture).astype(int) - before).max(axis=2)


def test_every_pixel_in_the_mask_changes_and_none_outside():
    image, mask = gray(), square_mask()
    picture = draw_instances(image, None, mask, [0], NAMES)
    assert picture.size == (80, 60)
    assert np.array_equal(change(image, picture) > 0, mask[0].numpy())


def test_opacity_scales_the_color():
    image, mask = gray(), square_mask()
    changes = [
        change(image, draw_instances(image, None, mask, [0], NAMES, opacity=opacity))[mask[0]]
        for opacity in (0.0, 0.5, 1.0)
    ]
    assert changes[0].max() == 0
    assert (changes[1] > 0).all()
    assert np.abs(2 * changes[1] - changes[2]).max() <= 2  # rounding


def test_every_instance_has_its_own_opacity():
    image, mask = gray(), square_mask()
    other = mask.flip(1).roll(-25, 2)
    other &= ~mask
    masks = torch.cat([mask, other])
    picture = draw_instances(image, None, masks, [0, 1], NAMES, opacity=torch.tensor([0.0, 1.0]))
    assert np.array_equal(change(image, picture) > 0, other[0].numpy())


@pytest.mark.parametrize("small_index", [0, 1])
def test_a_small_instance_lies_on_a_large_one_in_either_order(small_index):
    masks = [square_mask()[0], torch.zeros(60, 80, dtype=torch.bool)]
    masks[1][25:35, 40:50] = True
    if small_index == 0:
        masks.reverse()
    picture = draw_instances(gray(), None, torch.stack(masks), [0, 0], NAMES)
    pale = (np.array(instance_color(small_index)) + 255) / 2
    assert np.abs(np.array(picture)[25, 40:50] - pale).max() < 20  # its rim, nearly opaque


def test_probabilities_on_a_coarse_grid_cover_the_same_place():
    coarse = torch.zeros(1, 15, 20)
    coarse[0, 5:10, 8:15] = 0.9  # stride 4: rows 20..39, columns 32..59
    coarse[0, :3] = 0.4  # too unlikely to be drawn
    changed = change(gray(), draw_instances(gray(), None, coarse, [0], NAMES)) > 0
    expected = np.zeros((60, 80), dtype=bool)
    expected[20:40, 32:60] = True
    assert (changed & expected).sum() / (changed | expected).sum() > 0.9
    assert not changed[:12].any()


def test_boxes_are_drawn_at_the_pictures_scale():
    image = gray()
    box = torch.tensor([[30.0, 20.0, 60.0, 40.0]])
    for side, scale in ((None, 1), (160, 2)):
        picture = draw_instances(image, box, None, [0], ["only"], side=side)
        assert max(picture.size) == 80 * scale
        rows, columns = np.where((np.array(picture) != 100).any(axis=2))
        assert (rows.min(), rows.max() + 1) == (20 * scale, 40 * scale)
        assert (columns.min(), columns.max() + 1) == (30 * scale, 60 * scale)
        assert picture.getpixel((30 * scale, 30 * scale)) == instance_color(0)


def test_captions_name_classes_and_scores():
    box = torch.tensor([[30.0, 30.0, 60.0, 50.0]])

    def pixels(class_names, scores=None):
        picture = draw_instances(gray(), box, None, [0], class_names, scores=scores)
        return change(gray(), picture)[:28].any()

    assert pixels(NAMES)
    assert pixels(NAMES, [0.5])
    assert pixels(["only"], [0.5])
    assert not pixels(["only"])


@pytest.mark.parametrize("masks", [None, torch.zeros(0, 60, 80, dtype=torch.bool)])
@pytest.mark.parametrize("boxes", [None, torch.zeros(0, 4)])
def test_no_instances_leave_the_image_as_it_is(boxes, masks):
    picture = draw_instances(gray(), boxes, masks, [], NAMES, scores=[], opacity=torch.zeros(0))
    assert change(gray(), picture).max() == 0


def test_channels_may_be_first_or_last_and_the_input_is_kept():
    image = gray()
    last = image.permute(1, 2, 0).numpy()
    pictures = [draw_instances(x, None, square_mask(), [0], NAMES) for x in (image, last)]
    assert np.array_equal(np.array(pictures[0]), np.array(pictures[1]))
    assert (image == 100).all()
    with pytest.raises(ValueError, match="float32"):
        draw_instances(image.float(), None, None, [], NAMES)


def test_colors_are_distinct():
    colors = np.array([instance_color(i) for i in range(30)])
    assert len({tuple(c) for c in colors.tolist()}) == 30
    assert np.abs(np.diff(colors, axis=0)).max(axis=1).min() > 60  # neighbors clearly


@pytest.mark.parametrize("columns", [1, 4, 7])
def test_sheet_fits_every_picture_into_even_tiles(columns):
    sizes = [(128, 128), (1280, 640)]
    rows = [[Image.new("RGB", size, (200, 0, 0))] * columns for size in sizes]
    sheet = contact_sheet(rows, [f"column {i}" for i in range(columns)])
    assert sheet.width <= MAX_WIDTH
    is_red = (np.array(sheet) == (200, 0, 0)).all(axis=2)
    red_columns = is_red.any(axis=0)
    starts = np.where(np.diff(red_columns.astype(int)) == 1)[0]
    assert len(starts) == columns
    tile = red_columns.sum() // columns
    assert red_columns.sum() == columns * tile
    assert tile <= TILE
    assert is_red.sum() == columns * (tile * tile + tile * round(tile / 2))


def test_sheet_shows_its_titles_and_may_be_empty():
    blank, titled = (np.array(contact_sheet([], [title])) for title in ("", "truth"))
    assert blank.shape == titled.shape
    assert (blank == 255).all()
    assert (titled < 128).any()
    with pytest.raises(ValueError, match="2 titles"):
        contact_sheet([[Image.new("RGB", (8, 8))]], ["a", "b"])
