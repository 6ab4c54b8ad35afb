"""GenEval's prompt format, and a generator of training prompts over its 80 object classes (Ghosh et al. 2023)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

Metadata = dict[str, Any]
Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TAGS: Final[tuple[Tag, ...]] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: Final = ("left of", "right of", "above", "below")
NUMBER_WORDS: Final = {2: "two", 3: "three", 4: "four"}
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The detector's class names, in its order.
OBJECTS: Final = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
    fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,
    toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n    ", "").split(
        ","
    )
)
DRAWS_PER_LINE: Final = 1_000  # tries to find a line that is neither excluded nor already there
# Shares of the training set used by published GenEval post-training runs (7:5:3:1:1:0).
TRAINING_SHARES: Final[Mapping[Tag, float]] = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "two_object": 1,
    "colors": 1,
    "single_object": 0,
}


def with_article(phrase: str) -> str:
    """Return the phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """Return the plural of an object's name: "bus" becomes "buses", "knife" becomes "knives", "skis" stays."""
    if name in ("skis", "scissors", "sheep"):
        return name
    if name.endswith("knife"):
        return name[:-2] + "ves"
    if name in ("person", "computer mouse"):
        return {"person": "people", "computer mouse": "computer mice"}[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "sh", "ch", "x", "z")) else "s")


def single_object(name: str) -> Metadata:
    """Return the line of "a photo of a bench"."""
    return _line("single_object", [{"class": name, "count": 1}], with_article(name))


def two_object(first: str, second: str) -> Metadata:
    """Return the line of "a photo of a bench and a dog"."""
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _line("two_object", include, f"{with_article(first)} and {with_article(second)}")


def counting(name: str, count: int) -> Metadata:
    """Return the line of "a photo of three clocks", which excludes a fourth."""
    line = _line("counting", [{"class": name, "count": count}], f"{NUMBER_WORDS[count]} {plural(name)}")
    return {**line, "exclude": [{"class": name, "count": count + 1}]}


def colors(name: str, color: str) -> Metadata:
    """Return the line of "a photo of a blue car"."""
    return _line("colors", [{"class": name, "count": 1, "color": color}], with_article(f"{color} {name}"))


def position(name: str, relation: str, target: str) -> Metadata:
    """Return the line of "a photo of a dog right of a bench"; the target comes first in `include`."""
    include = [{"class": target, "count": 1}, {"class": name, "count": 1, "position": [relation, 0]}]
    return _line("position", include, f"{with_article(name)} {relation} {with_article(target)}")


def color_attr(first: str, first_color: str, second: str, second_color: str) -> Metadata:
    """Return the line of "a photo of a green bus and a purple microwave"."""
    include = [
        {"class": first, "count": 1, "color": first_color},
        {"class": second, "count": 1, "color": second_color},
    ]
    text = f"{with_article(f'{first_color} {first}')} and {with_article(f'{second_color} {second}')}"
    return _line("color_attr", include, text)


def content(line: Mapping[str, Any]) -> str:
    """Return what a line shows, the same for both orders of two objects and for a relation and its inverse."""
    clauses = sorted(f"{c['count']} {c.get('color', '')} {c['class']}" for c in line["include"])
    return f"{line['tag']}: {', '.join(clauses)}{_axis(line)}"


def generate_prompts(
    count: int, *, seed: int, exclude: Sequence[Mapping[str, Any]] = (), shares: Mapping[Tag, float] = TRAINING_SHARES
) -> list[Metadata]:
    """Generate `count` training lines; all differ but those of the two tags of which too few exist.

    Args:
        count: How many.
        seed: Same seed, same lines.
        exclude: Lines whose content must not occur, in either order: the evaluation prompts.
        shares: Relative frequency of each tag.

    Raises:
        ValueError: A tag has fewer different lines than its share asks for.
    """
    rng = random.Random(seed)
    excluded = {content(line) for line in exclude}
    seen: set[str] = set()
    return [_new_line(tag, rng, excluded, seen) for tag in rng.choices(list(shares), list(shares.values()), k=count)]


def _new_line(tag: Tag, rng: random.Random, excluded: set[str], seen: set[str]) -> Metadata:
    """Draw lines of one tag until one may be used; the tag stays, so that its share does not suffer from rejections."""
    for _ in range(DRAWS_PER_LINE):
        line = _random_line(tag, rng)
        # Only some hundred lines exist for these two tags, so they may repeat.
        repeats = tag in ("counting", "colors")
        if content(line) not in excluded and (repeats or line["prompt"] not in seen):
            seen.add(line["prompt"])
            return line
    raise ValueError(f"there are not so many different prompts of the tag {tag!r}; ask for fewer, or lower its share")


def _random_line(tag: Tag, rng: random.Random) -> Metadata:
    first, second = rng.sample(OBJECTS, 2)
    colored_first, colored_second = rng.sample(OBJECTS[1:], 2)  # persons are never coloured
    match tag:
        case "single_object":
            return single_object(first)
        case "two_object":
            return two_object(first, second)
        case "counting":
            return counting(first, rng.choice(list(NUMBER_WORDS)))
        case "colors":
            return colors(colored_first, rng.choice(COLORS))
        case "position":
            return position(first, rng.choice(RELATIONS), second)
        case "color_attr":
            first_color, second_color = rng.sample(COLORS, 2)
            return color_attr(colored_first, first_color, colored_second, second_color)


def _axis(line: Mapping[str, Any]) -> str:
    target, *others = line["include"]
    if not others or "position" not in others[0]:
        return ""
    relation, first, second = others[0]["position"][0], others[0]["class"], target["class"]
    if relation in ("right of", "below"):
        relation, first, second = {"right of": "left of", "below": "above"}[relation], second, first
    return f"; {first} {relation} {second}"


def _line(tag: Tag, include: list[dict[str, Any]], shown: str) -> Metadata:
    return {"tag": tag, "include": include, "prompt": f"a photo of {shown}"}
