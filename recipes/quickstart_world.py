"""The world of recipes/quickstart_vlm.py: equal things together in a quarter of a picture, perhaps others elsewhere.

What is in a picture, how it is drawn, what can be asked about it; and a picture of some of the answers.
"""

import math
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": "#e2383f",
    "orange": "#f6962b",
    "green": "#3ba54f",
    "blue": "#2e6fd8",
    "purple": "#8f4cc4",
    "black": "#2c2e34",
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
NUMBERS = ("one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
PAPER = "#f8f6f0"
SMOOTH = 8  # a picture is drawn this many times larger, then reduced
DESCRIBE = "What do you see?"


@dataclass(frozen=True)
class Group:
    """Equal things that lie together in a quarter of the picture."""

    number: str
    color: str
    shape: str
    place: str
    spots: tuple[tuple[float, float, float], ...]
    """Center and radius of each thing, as shares of the picture's side."""

    @property
    def things(self) -> str:
        """circle, or circles"""
        return self.shape if self.number == "one" else f"{self.shape}s"

    @property
    def words(self) -> str:
        """two red circles"""
        return f"{self.number} {self.color} {self.things}"


Scene = list[Group]  # from left to right and from top to bottom


def description(scene: Scene) -> str:
    """two red circles top left, one blue star bottom right"""
    return ", ".join(f"{group.words} {group.place}" for group in scene)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions about a picture, with the answers; about two groups only what is unambiguous."""
    asked = [(DESCRIBE, description(scene))]
    if len(scene) == 1:
        (group,) = scene
        asked += [
            ("What color are the things?", group.color),
            ("What shape are the things?", group.shape),
            ("How many things are there?", group.number),
            ("Where are the things?", group.place),
        ]
    return asked


def kinds(held_out: bool) -> list[tuple[str, str, str, str]]:
    """(number, color, shape, place) of groups in training pictures, or of those in held-out ones: none is in both.

    Of all places where the same things could be, one is held out.
    """
    found = []
    for (i, number), (j, color), (k, shape) in product(*map(enumerate, (NUMBERS, COLORS, SHAPES))):
        places = [place for n, place in enumerate(PLACES) if (n == (i + j + k) % len(PLACES)) == held_out]
        found += [(number, color, shape, place) for place in places]
    return found


def make_scene(rng: random.Random, groups: int, held_out: bool) -> Scene:
    """Groups of different color, shape and place."""
    chosen = rng.sample(kinds(held_out), groups)
    while any(len(set(words)) < groups for words in list(zip(*chosen, strict=True))[1:]):
        chosen = rng.sample(kinds(held_out), groups)
    scene = []
    for kind in chosen:
        row, column = divmod(PLACES.index(kind[3]), 2)
        spots = []
        for cell in rng.sample(range(4), NUMBERS.index(kind[0]) + 1):
            y, x = (0.26 + 0.48 * half for half in divmod(cell, 2))  # in the quarter
            x, y = ((at + corner) / 2 + rng.uniform(-0.02, 0.02) for at, corner in ((x, column), (y, row)))
            spots.append((x, y, rng.uniform(0.085, 0.1)))
        scene.append(Group(*kind, tuple(spots)))
    return sorted(scene, key=lambda group: PLACES.index(group.place))


def draw(scene: Scene, side: int) -> Image.Image:
    picture = Image.new("RGB", (side * SMOOTH, side * SMOOTH), PAPER)
    pen = ImageDraw.Draw(picture)
    for group in scene:
        for spot in group.spots:
            x, y, r = (share * side * SMOOTH for share in spot)
            draw_thing(pen, group.shape, x, y, r, COLORS[group.color])
    return picture.reduce(SMOOTH)


def draw_thing(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: str) -> None:
    def corners(*radii: float) -> list[tuple[float, float]]:
        turns = [2 * math.pi * i / len(radii) for i in range(len(radii))]
        return [(x + q * math.sin(a), y - q * math.cos(a)) for q, a in zip(radii, turns, strict=True)]

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=round(0.42 * r))
    elif shape == "square":
        pen.rectangle((x - 0.87 * r, y - 0.87 * r, x + 0.87 * r, y + 0.87 * r), fill=color)
    elif shape == "triangle":
        y += 0.2 * r  # its middle is below that of its corners
        pen.polygon(corners(*[1.2 * r] * 3), fill=color)
    else:
        pen.polygon(corners(*[1.2 * r, 0.5 * r] * 5), fill=color)


# ---------------------------------------------------------------------------------------------------------------------
# A picture of answers

INK, QUIET, RIGHT, WRONG = "#22252b", "#8a8f99", "#1f8a4c", "#c8373a"
CARD, GAP, TOP, COLUMNS = (850, 316), 28, 104, 2  # pixels


def draw_answers(path: Path, cards: list[tuple[Scene, dict]], titles: list[str], caption: str) -> None:
    """Scenes, each with one row of the exam: its question and the answers under `titles`."""
    page = Image.new(
        "RGB", (COLUMNS * (CARD[0] + GAP) + GAP, TOP + -(-len(cards) // COLUMNS) * (CARD[1] + GAP)), "white"
    )
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 28), "Combinations that it never saw in training", INK, ImageFont.load_default(38))
    pen.text((page.width - GAP, 36), caption, QUIET, ImageFont.load_default(28), anchor="ra")
    for i, (scene, row) in enumerate(cards):
        down, right = divmod(i, COLUMNS)
        draw_card(page, (GAP + right * (CARD[0] + GAP), TOP + down * (CARD[1] + GAP)), scene, row, titles)
    page.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_card(page: Image.Image, corner: tuple[int, int], scene: Scene, row: dict, titles: list[str]) -> None:
    (x, y), (width, height), pen = corner, CARD, ImageDraw.Draw(page)
    pen.rounded_rectangle((x, y, x + width, y + height), 18, fill="#fcfcfa", outline="#dcdad3", width=2)
    side = height - 40
    page.paste(draw(scene, side), (x + 20, y + 20))
    pen.rectangle((x + 20, y + 20, x + 20 + side, y + 20 + side), outline="#dcdad3", width=2)
    left, right, at = x + side + 48, x + width - 24, y + 30
    at = write(pen, (left, at), right, row["question"], INK, 30) + 18
    for title in titles:
        answer, color = row[title], RIGHT if row[title] == row["answer"] else WRONG
        pen.text((left, at), title, QUIET, ImageFont.load_default(22))
        at = write(pen, (left, at + 28), right, answer or "(nothing)", color, 28) + 12


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], right: int, text: str, color: str, size: int) -> int:
    """Text in lines that end before `right`; → where the next line would begin."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= right - corner[0] else [*lines, word]
    for i, line in enumerate(lines):
        pen.text((corner[0], corner[1] + i * round(1.25 * size)), line, color, font)
    return corner[1] + len(lines) * round(1.25 * size)
