"""The words of the drawn world: its shapes, colours, counts and relations."""

from typing import Final, Literal

Shape = Literal["circle", "square", "triangle", "star", "cross", "ring"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"]
Relation = Literal["left of", "right of", "above", "below"]

SHAPES: Final[tuple[Shape, ...]] = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: Final[dict[Color, tuple[int, int, int]]] = {
    "red": (220, 38, 38),
    "orange": (249, 130, 22),
    "yellow": (245, 225, 40),
    "green": (34, 160, 70),
    "blue": (40, 90, 225),
    "purple": (130, 50, 190),
    "pink": (250, 140, 195),
    "black": (25, 25, 30),
}
BACKGROUND: Final[tuple[int, int, int]] = (214, 214, 208)
RELATIONS: Final[tuple[Relation, ...]] = ("left of", "right of", "above", "below")
NUMBERS: Final = (2, 3, 4)
IMAGE_SIZE: Final = 64
