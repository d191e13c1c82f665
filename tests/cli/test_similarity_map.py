"""Tests of the map of voices."""

import json
import re

import numpy as np
import pytest

from speechbrain_ram.cli.similarity_map import (
    colours,
    draw_map,
    project,
    without_legend,
    write_html,
)

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def groups():
    """Three tight groups of directions, of any length."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((3, 16))
    owners = np.repeat([0, 1, 2], 12)
    points = centres[owners] + 0.1 * generator.standard_normal((36, 16))
    return points * generator.uniform(0.1, 10, (36, 1)), owners


@pytest.fixture(scope="module")
def points(groups):
    return project(groups[0])


def test_alike_is_near(groups, points):
    assert points.shape == (36, 2)
    assert np.abs(points).max() == pytest.approx(1.0)
    owners = groups[1]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (owners[distances.argmin(axis=1)] == owners).all()


def test_one_seed_one_map(groups, points):
    assert np.array_equal(project(groups[0]), points)


def test_lengths_do_not_matter(groups, points):
    assert np.allclose(project(groups[0] * 4.0), points)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.ones((3, 4)), "A map of 3 recordings"),
        (np.zeros((9, 4)), "zero, NaN or infinite"),
        (np.full((9, 4), np.nan), "zero, NaN or infinite"),
    ],
)
def test_nothing_to_map(embeddings, message):
    with pytest.raises(ValueError, match=message):
        project(embeddings)


def test_small_maps():
    assert project(np.eye(4)).shape == (4, 2)


def test_colours_differ():
    assert len(set(colours(100))) == 100
    assert all(re.fullmatch("#[0-9a-f]{6}", c) for c in colours(7))


@pytest.mark.parametrize("speakers", [3, 36])
def test_the_image(points, tmp_path, speakers):
    from PIL import Image

    names = [f"s{i % speakers}" for i in range(36)]
    draw_map(points, names, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert 1050 < max(image.size) < 1500
        assert len(image.convert("RGB").getcolors(10**6)) > 3 * speakers
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("side", [0, 1])
def test_the_image_has_the_form_of_the_cloud(points, tmp_path, side):
    """A narrow cloud fills it, with the legend beside it."""
    from PIL import Image

    narrow = points.copy()
    narrow[:, side] *= 0.1
    draw_map(narrow, [f"s{i % 3}" for i in range(36)], tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        picture = np.asarray(image.convert("L"))
    assert 0.45 < picture.shape[1 - side] / picture.shape[side] < 0.75
    frame = [np.flatnonzero((picture < 250).sum(axis=i) > 450) for i in (0, 1)]
    width, height = (np.ptp(each) for each in frame)
    assert width * height > 0.6 * picture.size


@pytest.mark.parametrize("speakers", [36, 72])
def test_an_image_without_a_legend_says_so(
    points, tmp_path, monkeypatch, speakers
):
    from matplotlib.axes import Axes

    said = []
    monkeypatch.setattr(
        Axes, "set_xlabel", lambda _, text, **__: said.append(text)
    )
    many = np.concatenate([points, points[::-1] * 0.9])[:speakers]
    draw_map(many, [f"s{i}" for i in range(speakers)], tmp_path / "map.png")
    assert said == [without_legend(speakers)]
    assert ("without a legend; a map in .html" in said[0]) == (speakers > 40)


def test_the_page_holds_everything_and_escapes_it(points, tmp_path):
    path = tmp_path / "map.html"
    speakers = ["<i>ada</i>"] * 18 + ["bob"] * 18
    names = [f"</script>{i}.wav" for i in range(36)]
    write_html(points, speakers, names, path, title="<b>Voices</b>")
    page = path.read_text()
    assert page.count("</script>") == 1
    assert "&lt;b&gt;Voices" in page and "<b>" not in page
    assert "http" not in page
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["speakers"] == ["<i>ada</i>", "bob"]
    assert [row[2] for row in data["points"]] == [0] * 18 + [1] * 18
    assert data["points"][5][3] == names[5]
    np.testing.assert_allclose(
        [row[:2] for row in data["points"]], points, atol=1e-4
    )


def test_the_page_tells_neighbours_apart_by_shape(points, browser, tmp_path):
    """Where colours cannot be told: circle, square and triangle."""
    path = tmp_path / "map.html"
    write_html(points, [f"s{i % 4}" for i in range(36)], ["n"] * 36, path)
    browser.get(path.as_uri())
    masks = browser.execute_script(
        "return [...document.querySelectorAll('nav canvas')].map(c => "
        "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        ".filter((_, i) => i % 4 == 3).map(alpha => alpha > 127).join(''))"
    )
    assert len(masks) == 4 and len(set(masks)) == 3 and masks[0] == masks[3]
    ink = "const c = document.querySelector('main canvas'); return c.getContext"
    ink += "('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)"
    assert browser.execute_script(ink)
    assert not browser.get_log("browser")
