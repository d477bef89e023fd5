"""Color goes where the mask is, as strong as the opacity. Captions share the free places. Sheets
have titles and even tiles, and fit a screen."""

import itertools
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from boxteacher.visualize import (
    MAX_CAPTIONS,
    MAX_HEIGHT,
    MAX_INSTANCES,
    MAX_WIDTH,
    TILE,
    contact_sheet,
    draw_instances,
    instance_color,
    sheet_side,
)

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


@pytest.mark.parametrize("tint", [(255, 0, 0), (0, 255, 0), (90, 90, 200)])
def test_the_colors_of_the_image_do_not_mix_in(tint):
    image = torch.tensor(tint, dtype=torch.uint8)[:, None, None].repeat(1, 60, 80)
    picture = draw_instances(image, None, square_mask(), [0], NAMES, colors=[(10, 200, 30)])
    gray = Image.new("RGB", (1, 1), tint).convert("L").getpixel((0, 0))
    expected = (np.array((10, 200, 30)) + gray) / 2
    assert np.abs(np.array(picture)[30, 45] - expected).max() <= 1


def test_steps_of_a_coarse_grid_become_straight_lines():
    rows, columns = np.mgrid[:32, :32]
    coarse = torch.from_numpy(columns > 6 + rows / 2)[None]  # a line, in steps of whole cells
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture = draw_instances(image, None, coarse, [0], NAMES, side=384)
    inside = np.array(picture).max(axis=2) > 60
    first = inside.argmax(axis=1)[48:-48] / 12  # in cells, away from the ends
    line = np.arange(48, 384 - 48) / 24
    assert np.ptp(first - line) < 0.4  # steps: 1.5


def test_a_mask_of_one_coarse_cell_is_drawn_where_it_is():
    coarse = torch.zeros(1, 15, 20, dtype=torch.bool)
    coarse[0, 7, 10] = True
    changed = change(gray(), draw_instances(gray(), None, coarse, [0], NAMES)) > 40
    assert changed[28:32, 40:44].all()
    assert changed.sum() < 4 * 16


def test_a_mask_finer_than_the_picture_has_soft_edges():
    fine = torch.zeros(1, 120, 160, dtype=torch.bool)
    fine[0, 41:81, 60:120] = True  # a pixel of the picture is covered by half
    changed = change(gray(), draw_instances(gray(), None, fine, [0], NAMES))
    assert 0 < changed[20, 45] < changed[21, 45]


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


def test_colors_can_be_given():
    box, color = torch.tensor([[30.0, 20.0, 60.0, 40.0]]), (1, 2, 250)
    picture = draw_instances(gray(), box, None, [0], ["only"], colors=[color])
    assert picture.getpixel((30, 30)) == color


@pytest.fixture
def texts(monkeypatch) -> list[tuple[str, tuple[float, float, float, float]]]:
    """What is written, and the room that it takes with two pixels left and right."""
    written, write = [], ImageDraw.ImageDraw.text

    def text(draw, xy, text, fill=None, font=None, *args, **kwargs):
        x, y = xy
        width = draw.textlength(text, font)
        written.append((text, (x - 2, y, x + width + 1, y + 15)))
        write(draw, xy, text, fill, font, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("seed", range(5))
def test_captions_lie_in_the_picture_and_hide_neither_each_other_nor_small_boxes(texts, seed):
    rng = np.random.default_rng(seed)
    start, side = rng.uniform(0, 250, (MAX_CAPTIONS, 2)), rng.uniform(5, 70, (MAX_CAPTIONS, 2))
    boxes = np.concatenate([start, start + side], axis=1).round()
    image = torch.zeros(3, 320, 320, dtype=torch.uint8)
    labels, scores = [0] * MAX_CAPTIONS, rng.uniform(0, 1, MAX_CAPTIONS)
    captioned = draw_instances(image, boxes, None, labels, NAMES, scores)
    rooms = [room for _, room in texts]
    assert len(rooms) >= MAX_CAPTIONS / 2
    assert all(0 <= room[0] < room[2] <= 320 and 0 <= room[1] < room[3] <= 320 for room in rooms)
    assert not any(overlap(a, b) for a, b in itertools.combinations(rooms, 2))
    plain = np.array(draw_instances(image, boxes, None, labels, ["only"]))
    for x1, y1, x2, y2 in boxes[side.min(axis=1) < 48].astype(int):
        assert np.array_equal(np.array(captioned)[y1:y2, x1:x2], plain[y1:y2, x1:x2])


def test_captions_without_a_free_place_are_left_out(texts):
    boxes = torch.tensor([[10.0, 20.0, 70.0, 40.0]] * 5)
    draw_instances(gray(), boxes, None, [0] * 5, NAMES)
    assert 1 <= len(texts) < 5
    texts.clear()
    draw_instances(gray(), boxes[:1].repeat(MAX_CAPTIONS + 1, 1), None, [0] * 16, NAMES)
    assert not texts


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("zebra\ncrossing", "zebra crossing"),
        ("\x1b[31mred\x00\u202e", "[31mred"),
        ("lone \ud800 half", "lone half"),
        ("\n\t", "?"),
        ("x" * 1_000_000, "x" * 21 + "..."),
    ],
)
def test_names_are_cleaned_and_cut(texts, name, shown):
    image = torch.zeros(3, 300, 300, dtype=torch.uint8)
    draw_instances(image, torch.tensor([[9.0, 99.0, 99.0, 199.0]]), None, [0], [name, "b"], [0.5])
    assert [text for text, _ in texts] == [f"{shown} 0.50"]


def test_of_very_many_instances_the_first_are_drawn_and_the_picture_says_so(texts):
    rng, count, image = np.random.default_rng(0), 50_000, torch.zeros(3, 200, 200).byte()
    boxes = np.sort(rng.uniform(0, 180, (count, 2, 2)), axis=1).reshape(count, 4)
    masks = torch.from_numpy(rng.uniform(size=(1, 8, 8)) > 0.9).expand(count, 8, 8)
    started = time.process_time()
    drawn = draw_instances(image, boxes, masks, [0] * count, NAMES, [0.5] * count)
    assert time.process_time() - started < 20
    assert [text for text, _ in texts] == [f"{MAX_INSTANCES} of {count} drawn"]
    few = slice(MAX_INSTANCES)
    first = draw_instances(image, boxes[few], masks[few], [0] * MAX_INSTANCES, NAMES)
    assert np.array_equal(np.array(drawn)[:180], np.array(first)[:180])  # the text is below


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


@pytest.mark.parametrize(("height", "width"), [(20, 3), (3, 20), (1, 50), (50, 1)])
def test_thin_images_keep_their_shape(height, width):
    box, mask = torch.tensor([[0, 0, width, height]]), torch.ones(1, height, width)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for pixels in (image, image.permute(1, 2, 0).numpy()):
        picture = draw_instances(pixels, box, mask, [0], NAMES, [0.5], side=100)
        scale = 100 / max(height, width)
        assert picture.size == (round(scale * width), round(scale * height))


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


@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("size", [(100, 100), (640, 480), (2000, 30), (30, 2000), (1, 5000)])
def test_sheets_fit_a_screen(size, rows):
    picture, titles = Image.new("RGB", size), ["title"] * 4
    sheet = contact_sheet([[picture] * 4] * rows, titles, footer="what the colors mean")
    assert sheet.width <= MAX_WIDTH
    assert sheet.height <= MAX_HEIGHT
    side = sheet_side([size[1] / max(size)] * rows, 4)
    assert sheet.width >= 4 * side >= 4 * 200
    assert sheet == contact_sheet([[picture] * 4] * rows, titles, "what the colors mean", side)


def test_the_footer_is_below_the_pictures():
    plain, with_footer = (
        contact_sheet([[Image.new("RGB", (50, 50), "white")]], ["a"], footer)
        for footer in ("", "a word")
    )
    assert with_footer.height > plain.height
    pixels = np.array(with_footer)
    assert np.array_equal(pixels[: plain.height - 8], np.array(plain)[:-8])
    assert (pixels[plain.height - 8 :] < 128).any()
