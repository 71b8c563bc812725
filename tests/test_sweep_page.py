"""The page of a sweep in headless Chromium: the sliders move pictures, numbers and curves."""

import itertools

import numpy as np
import pytest

from alignprop_jax.pages.sweep import lora_name, write_page
from tests.chromium import open_page

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANGES = ((1000, 500), (1000, 0), (500, 0))
PROMPTS = ["a cat", "</script><script>document.title = 'broken'</script>"]


def mean_score(alpha, span):
    return 2.0 + alpha * (1 - alpha) + RANGES.index(span)


def color(alpha, span):
    """Of the picture of a point."""
    return (round(200 * alpha), 40 + 80 * RANGES.index(span), 60)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page of made-up scores and pictures of one colour, each point with its own."""
    records, pictures = [], []
    for span, alpha in itertools.product(RANGES, ALPHAS):
        score = mean_score(alpha, span)
        records.append(
            {
                "mix": alpha,
                "lora_timesteps": list(span),
                "n": 8,
                "reward_mean": score,
                "reward_std": 1.0,
                "reward/aesthetic_mean": 10 * score,
                "reward/path/to/file.py:redness_mean": 0.25,
                "judge_mean": None if alpha == 0.25 else alpha,
            }
        )
        image = np.full((64, 64, 3), color(alpha, span), np.uint8)
        pictures.append(np.stack([image, 255 - image]))
    path = tmp_path_factory.mktemp("page") / "sweep.html"
    write_page(
        path,
        records,
        pictures,
        prompts=[*PROMPTS, "a prompt without picture"],
        files=["runs/glossy/lora/pytorch_lora_weights.safetensors", "runs/small.safetensors"],
        model="models/emoji",
        weights={"aesthetic": 1.0, "path/to/file.py:redness": 0.5},
        num_timesteps=1000,
    )
    return path


@pytest.fixture
def page(browser, page_file):
    with open_page(browser, page_file) as page:
        yield page


def pixel(page, picture):
    """The colour in the middle of a picture, as the browser shows it."""
    return page.evaluate(
        """async (index) => {
            const image = document.images[index];
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return Array.from(context.getImageData(32, 32, 1, 1).data).slice(0, 3);
        }""",
        picture,
    )


def number(page, score):
    return page.locator(f"output[data-score='{score}']").inner_text()


def marker(page, chart):
    """Where a chart's marker is, in the units of its drawing."""
    circle = page.locator(".chart").nth(chart).locator("circle")
    return tuple(float(circle.get_attribute(name)) for name in ("cx", "cy"))


def move(page, slider, steps):
    """As a person does with the keyboard."""
    page.locator(f"#{slider}").focus()
    for _ in range(abs(steps)):
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")


def assert_shows(page, alpha, span):
    assert page.locator("#alpha-value").inner_text() == f"{alpha:.2f}"
    assert page.locator("#timesteps-value").inner_text() == f"{span[0]} to {span[1]}"
    # WebP is lossy.
    np.testing.assert_allclose(pixel(page, 0), color(alpha, span), atol=4)
    np.testing.assert_allclose(pixel(page, 1), 255 - np.array(color(alpha, span)), atol=4)
    assert number(page, "reward") == f"{mean_score(alpha, span):.3f}"
    assert number(page, "reward/aesthetic") == f"{10 * mean_score(alpha, span):.3f}"


def test_sliders_move_pictures_numbers_and_markers(page):
    assert_shows(page, 0.5, (1000, 0))  # the middle, on at all timesteps
    at_half = marker(page, 0)
    move(page, "alpha", 2)
    assert_shows(page, 1.0, (1000, 0))
    at_one = marker(page, 0)
    assert at_one[0] > at_half[0] and at_one[1] > at_half[1]  # to the right, and lower
    move(page, "timesteps", 1)
    assert_shows(page, 1.0, (500, 0))
    assert marker(page, 0)[0] == at_one[0] and marker(page, 0)[1] < at_one[1]  # higher
    move(page, "timesteps", -2)
    move(page, "alpha", -4)
    assert_shows(page, 0.0, (1000, 500))
    page.locator("#alpha").fill("3")
    assert_shows(page, 0.75, (1000, 500))


def test_curves_are_drawn_to_scale(page):
    """Heights on the drawing are a linear function of the scores, alpha runs from edge to edge."""
    move(page, "alpha", -2)
    points = []
    for _ in ALPHAS:
        points.append((*marker(page, 1), float(number(page, "reward/aesthetic"))))
        move(page, "alpha", 1)
    x, y, scores = np.array(points).T
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0])
    slope, offset = np.polyfit(scores, y, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * scores + offset, y, atol=0.05)
    curve = page.locator(".chart").nth(1).locator("path.on").get_attribute("d")
    drawn = np.array(curve.replace("M", "L").replace("L", " ").split(), float).reshape(-1, 2)
    np.testing.assert_allclose(drawn, np.stack([x, y], 1), atol=0.06)
    text = page.locator(".chart").nth(1).locator("svg").text_content()
    assert "alpha, share of A" in text and "mean score" in text
    assert page.locator(".chart").nth(1).locator("path.curve").count() == len(RANGES) + 1


def test_a_score_without_value_is_a_gap(page):
    move(page, "alpha", -1)
    assert number(page, "judge") == "none"
    judge = page.locator(".chart").nth(3)
    assert judge.locator("circle").get_attribute("visibility") == "hidden"
    assert judge.locator("path.on").get_attribute("d").count("M") == 2


def test_the_page_says_what_it_shows(page):
    assert page.title() == "Mixing glossy (A) and small (B)"
    labels = page.locator(".chart header span").all_inner_texts()
    assert labels == ["reward", "aesthetic", "redness", "judge"]
    assert "The reward is 1 aesthetic + 0.5 redness." in page.locator("#legend").inner_text()
    assert page.locator("figcaption").all_inner_texts() == PROMPTS
    assert page.locator("#end-a").inner_text() == "1: glossy"


def test_the_page_needs_nothing_but_itself(page, page_file):
    move(page, "alpha", 1)
    kinds = {complaint.split(":")[0] for complaint in page.complaints}
    assert kinds <= {"file", "data"}, page.complaints
    assert page.complaints.count(page_file.as_uri()[:40]) == 1
    assert page_file.stat().st_size < 50_000


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_cut_off_at_any_width(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    boxes = [page.locator("figure").nth(index).bounding_box() for index in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 100


def test_dark_and_light(page):
    def brightness(scheme):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        colors = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        return [sum(map(int, text[4:-1].split(","))) / 765 for text in colors]

    for scheme, ground, ink in (("light", 0.9, 0.2), ("dark", 0.1, 0.9)):
        np.testing.assert_allclose(brightness(scheme), (ground, ink), atol=0.15)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("runs/glossy/lora/pytorch_lora_weights.safetensors", "glossy"),
        ("runs/glossy/lora", "glossy"),
        ("runs/small.safetensors", "small"),
        ("lora", "lora"),
    ],
)
def test_a_lora_is_called_by_its_run(file, name):
    assert lora_name(file) == name
