"""The loss curve: well-formed, true to the numbers, and unimpressed by what is not finite."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from checkpointing.loss_plot import BOTTOM, LEFT, RIGHT, TOP, _smooth, _thin, draw_loss_curve, ticks

SVG = "{http://www.w3.org/2000/svg}"


def draw(rows: list[dict], path: Path, **options) -> ElementTree.Element:
    draw_loss_curve(rows, path / "loss.svg", **options)
    picture = ElementTree.parse(path / "loss.svg").getroot()
    assert (picture.get("width"), picture.get("height")) == ("800", "450")
    return picture


def lines(picture: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in picture.iter(f"{SVG}polyline")]
    return [points for points in found if points]


def words(picture: ElementTree.Element) -> str:
    return " | ".join("".join(e.itertext()).replace("\xa0", " ") for e in picture.iter(f"{SVG}text"))


def test_points_lie_where_their_numbers_are(tmp_path: Path):
    rows = [{"step": 1, "loss": 4.0, "lr": 1e-4}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 2.0}]
    rows += [{"step": 3, "eval_loss": 2.5}, {"step": 1, "eval_loss": 3.5}, {"step": 2, "eval_loss_ema": 3.0}]
    picture = draw(rows, tmp_path, title="a <b> & c")
    (train, evaluation, average) = lines(picture)
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert train == [(LEFT, TOP), (middle_x, middle_y), (RIGHT, BOTTOM)]
    assert evaluation == [(LEFT, TOP + (BOTTOM - TOP) / 4), (RIGHT, TOP + (BOTTOM - TOP) * 3 / 4)]
    assert average == [(middle_x, middle_y)]
    assert len({e.get("fill") for e in picture.iter(f"{SVG}circle")}) == 2  # their colours
    assert len(list(picture.iter(f"{SVG}circle"))) == 3
    text = words(picture)
    assert "a <b> & c" in text and "● training 2.000    ● evaluation 2.500    ● eval_loss_ema 3.000" in text
    assert picture.find(f"{SVG}rect").get("fill") == "#fff"  # its own background, for dark pages


def test_what_is_not_finite_is_left_out(tmp_path: Path):
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": "NaN"},
        {"step": 3, "loss": math.inf},
        {"step": 4, "loss": None},
    ]
    picture = draw(rows + [{"step": 5, "loss": 1.0}, {"eval_loss": 3.0}], tmp_path)
    assert lines(picture) == [[(LEFT, TOP), (RIGHT, BOTTOM)]]
    assert not {"nan", "inf"} & set(words(picture).lower().split())


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": "NaN"}], [{"step": 1, "loss": math.nan, "eval_loss": None}]])
def test_nothing_to_draw_says_so(rows: list[dict], tmp_path: Path):
    assert "no finite loss yet" in words(draw(rows, tmp_path))


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_one_row_is_a_dot_inside(name: str, tmp_path: Path):
    (dot,) = draw([{"step": 7, name: 2.345}], tmp_path).iter(f"{SVG}circle")
    assert float(dot.get("cx")) == (LEFT + RIGHT) / 2 and TOP < float(dot.get("cy")) < BOTTOM


@pytest.mark.parametrize("loss", [0.0, 1.5, -2.0, 1e-9, 1e9])
def test_a_constant_loss_is_a_level_line_inside(loss: float, tmp_path: Path):
    (line,) = lines(draw([{"step": i, "loss": loss} for i in range(5)], tmp_path))
    assert len({y for _, y in line}) == 1 and TOP < line[0][1] < BOTTOM


def test_a_long_run_keeps_its_spikes_and_stays_small(tmp_path: Path):
    rows = [{"step": i, "loss": 2.0 + 0.1 * math.sin(i)} for i in range(100_000)]
    rows[54_321]["loss"] = 9.0
    raw, smooth = lines(draw(rows, tmp_path))
    assert (tmp_path / "loss.svg").stat().st_size < 60_000
    top = min(y for _, y in raw)
    x = next(x for x, y in raw if y == top)
    assert x == pytest.approx(LEFT + (RIGHT - LEFT) * 0.54321, abs=0.2)
    assert top < min(y for _, y in smooth) - 100  # the mean does not jump with it


def test_smoothing_is_a_centred_mean():
    straight = [(float(i), 3.0 - 0.01 * i) for i in range(200)]
    smooth = _smooth(straight)
    assert [x for x, _ in smooth] == [x for x, _ in straight]
    assert [y for _, y in smooth[5:-5]] == pytest.approx([y for _, y in straight[5:-5]])  # no lag
    zigzag = _smooth([(float(i), float(i % 2)) for i in range(440)])  # 23 values each
    assert {round(y, 6) for _, y in zigzag[11:-11]} == {round(11 / 23, 6), round(12 / 23, 6)}


def test_thinning_keeps_extremes_and_order():
    points = [(float(i), float((i * 7919) % 1009)) for i in range(10_000)]
    thin = _thin(points)
    assert len(thin) <= 1300 and thin == sorted(thin)
    assert {min(y for _, y in points), max(y for _, y in points)} <= {y for _, y in thin}
    assert _thin(points[:1200]) == points[:1200]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.42, 2.9], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
        ([1.0, 2.0], [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]),
        ([0.0, 59.0], [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]),
    ],
)
def test_ticks_are_round(values: list[float], expected: list[float]):
    assert ticks(values, 6) == pytest.approx(expected)
    assert ticks([1, 3], 8, whole=True) == [1.0, 2.0, 3.0]  # there is no half step
