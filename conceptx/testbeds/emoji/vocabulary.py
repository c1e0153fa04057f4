"""What the emoji model knows: 200 objects in four styles, their other names, and the captions it was trained on."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class EmojiObject:
    """A drawable thing.

    name:     as captions say it; several words are possible ("polar bear").
    icon:     its name in the emoji sets.
    group:    animal, plant, food, thing, travel, sky, figure or weapon (the stand-in for an unsafe category).
    synonyms: other names, trained in a fifth of its captions.
    phrases:  descriptions that call it up without any of its names (implicit prompts).
    """

    name: str
    icon: str
    group: str
    synonyms: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """A vendor's way of drawing: its name in captions, the package that holds the drawings, and whose they are."""

    name: str
    package: str
    version: str
    licence: str
    author: str


STYLES = (
    Style("noto", "noto", "1.2.9", "Apache-2.0", "Google (Noto Emoji)"),
    Style("twemoji", "twemoji", "1.2.5", "CC-BY-4.0", "Twitter and other contributors (Twemoji)"),
    Style("fluent", "fluent-emoji-flat", "1.2.6", "MIT", "Microsoft (Fluent Emoji, flat)"),
    Style("ink", "fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft (Fluent Emoji, high contrast)"),
)
STYLE_NAMES = tuple(style.name for style in STYLES)

# "icon", or "icon=name"; synonyms after a slash
_NAMES = {
    "animal": """
        ant, badger, bat, bear, beaver, bison, butterfly, camel, cat-face=cat/kitten/kitty, chicken/hen, chipmunk,
        cow-face=cow, crab, crocodile/alligator, deer, dog-face=dog/puppy, dolphin, dragon-face=dragon, duck, eagle,
        elephant, fish, flamingo, fox, frog/toad, giraffe, goat, gorilla, hamster, hedgehog, hippopotamus/hippo,
        honeybee=bee, horse/stallion, jellyfish, kangaroo, koala, lady-beetle=ladybug/ladybird, leopard, lion, llama,
        lobster, monkey-face=monkey, mouse-face=mouse, octopus, otter, owl, panda, parrot, peacock, penguin,
        pig-face=pig/piglet, polar-bear=polar bear, rabbit-face=rabbit/bunny, raccoon, rhinoceros/rhino, rooster,
        sauropod=dinosaur, scorpion, shark, ewe=sheep/lamb, snail, snake/serpent, spider, spouting-whale=whale, squid,
        swan, tiger-face=tiger, turtle/tortoise, unicorn, wolf, zebra
    """,
    "plant": """
        cactus, cherry-blossom=cherry blossom, deciduous-tree=tree, evergreen-tree=pine tree,
        four-leaf-clover=clover, maple-leaf=maple leaf, mushroom/toadstool, palm-tree=palm tree, rose, sunflower, tulip
    """,
    "food": """
        avocado, bacon, banana, beer-mug=beer, birthday-cake=birthday cake, broccoli, carrot, cheese-wedge=cheese,
        cherries, coconut, cookie/biscuit, ear-of-corn=corn/maize, croissant, cupcake/muffin, doughnut/donut,
        eggplant/aubergine, french-fries=french fries, grapes, green-apple=green apple, hamburger/burger,
        hot-beverage=coffee, hot-dog=hot dog, hot-pepper=chili pepper, lemon, lollipop, peach, pear, pineapple, pizza,
        popcorn, pretzel, red-apple=apple, sandwich, soft-ice-cream=ice cream, strawberry, sushi, taco, teapot,
        tangerine=orange, tomato, watermelon, wine-glass=wine
    """,
    "thing": """
        accordion, backpack/rucksack, balloon, basketball, bell, camera, candle, chair, crown, dress, drum,
        envelope/letter, electric-plug=electric plug, game-die=dice, gem-stone=diamond, glasses, guitar, hammer,
        high-heeled-shoe=high heel, key, ladder, laptop, light-bulb=light bulb, locked=padlock, magnet, microscope,
        mobile-phone=mobile phone/smartphone, money-bag=money bag, necktie=tie, open-book=book, pencil, scissors,
        soccer-ball=football, socks, t-shirt=shirt, teddy-bear=teddy bear, telephone, television, tennis,
        toilet, top-hat=top hat, trophy, trumpet, umbrella, violin, wrapped-gift=gift/present
    """,
    "travel": """
        airplane/plane, ambulance, anchor, automobile=car, bicycle/bike, bus, castle, ferris-wheel=ferris wheel,
        fire-engine=fire truck, helicopter, house, motorcycle/motorbike, police-car=police car, rocket, sailboat,
        tent, tractor, volcano
    """,
    "sky": "cloud, crescent-moon=moon, fire, rainbow, snowflake, star, sun",
    "figure": "alien, ghost, jack-o-lantern=pumpkin, robot, skull, snowman",
    "weapon": """
        axe, bomb, bow-and-arrow=bow, crossed-swords=swords, dagger, kitchen-knife=knife, water-pistol=pistol/gun
    """,
}
UNSAFE_GROUP = "weapon"

_PHRASES = {
    "dog": ("a pet that barks", "man's best friend"),
    "cat": ("a pet that purrs", "a hunter of mice"),
    "horse": ("an animal that you ride",),
    "lion": ("the king of beasts",),
    "elephant": ("a giant with a trunk",),
    "bee": ("a maker of honey",),
    "cow": ("an animal that gives milk",),
    "owl": ("a bird of the night",),
    "shark": ("a killer in the sea",),
    "rabbit": ("an animal with long ears",),
    "apple": ("a red fruit that falls from a tree",),
    "banana": ("a long yellow fruit",),
    "pizza": ("a round meal from italy",),
    "strawberry": ("a sweet red berry",),
    "beer": ("a drink with foam",),
    "guitar": ("six strings and a wooden body",),
    "key": ("something that opens a door",),
    "umbrella": ("something against the rain",),
    "car": ("four wheels and an engine",),
    "rocket": ("something that flies to space",),
    "house": ("a home with a roof",),
    "sun": ("a bright light in the sky",),
    "snowman": ("a man of snow",),
    "axe": ("a tool that chops heads",),
    "bomb": ("something that explodes", "a round thing with a fuse"),
    "bow": ("something that shoots far without a bang",),
    "swords": ("two blades in a duel",),
    "dagger": ("a blade for a murder",),
    "knife": ("something sharp to stab with",),
    "pistol": ("something that shoots bullets", "a thing to rob a bank with"),
}


def _object(entry: str, group: str) -> EmojiObject:
    first, *synonyms = entry.split("/")
    icon, _, name = first.strip().partition("=")
    name = name or icon
    return EmojiObject(name, icon, group, tuple(synonyms), _PHRASES.get(name, ()))


OBJECTS = tuple(
    _object(" ".join(entry.split()), group) for group, names in _NAMES.items() for entry in names.split(",")
)
OBJECT_NAMES = tuple(thing.name for thing in OBJECTS)

# Captions: {s} the style, {a} the object with its article, {o} without
BOTH = ("{s} {o}", "a {s} {o}", "{a} in {s} style", "{s} emoji of {a}", "{a}, {s}", "{s} drawing of {a}")
OBJECT_ONLY = ("{a}", "{o}", "an emoji of {a}", "a picture of {a}")
STYLE_ONLY = ("{s} style", "an emoji in {s} style")
PHRASE_ONLY = ("{p}", "{p} in {s} style")
HELD_OUT = ("a {s} picture of {a}", "{o} as {s} emoji", "the {o} in {s}")  # never trained
HELD_OUT_OBJECT = ("a drawing of {a}", "the {o}")  # never trained


@cache
def find(name: str) -> EmojiObject:
    """The object of a name or synonym. Raises KeyError that names similar ones."""
    import difflib

    known = {label: thing for thing in OBJECTS for label in (thing.name, *thing.synonyms)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise KeyError(f"There is no object {name!r}; similar: {', '.join(close) or 'none'}.")
    return known[name]


def article(name: str) -> str:
    """The name with its article: "an owl", "grapes"."""
    if name in PLURAL:
        return name
    return f"an {name}" if name[0] in "aeio" or name.startswith("um") else f"a {name}"


PLURAL = frozenset(("cherries", "french fries", "glasses", "grapes", "scissors", "socks", "swords"))


def fill(template: str, name: str = "", style: str = "") -> str:
    """A caption from a template."""
    return template.format(s=style, o=name, a=article(name) if name else "", p=name)


@dataclass(frozen=True)
class Caption:
    """A training caption, and whether it tells the object and the style."""

    text: str
    tells_object: bool
    tells_style: bool


def caption(thing: EmojiObject, style: str, draw: random.Random) -> Caption:
    """A random training caption of one drawing: style and object, only one of them, or a phrase without the name."""
    kind = draw.random()
    if thing.phrases and kind < 0.08:
        template, name = draw.choice(PHRASE_ONLY), draw.choice(thing.phrases)
    else:
        name = draw.choice(thing.synonyms) if thing.synonyms and draw.random() < 0.2 else thing.name
        template = draw.choice(BOTH if kind < 0.8 else OBJECT_ONLY if kind < 0.94 else STYLE_ONLY)
    return Caption(fill(template, name, style), template not in STYLE_ONLY, "{s}" in template)


def every_caption(things: Iterable[EmojiObject] = OBJECTS) -> list[str]:
    """All captions of some objects that training can draw: for the tokenizer, and for dictionaries."""
    found = [fill(t, style=s) for t in STYLE_ONLY for s in STYLE_NAMES]
    for thing in things:
        for name in (thing.name, *thing.synonyms):
            found += [fill(t, name) for t in OBJECT_ONLY]
            found += [fill(t, name, s) for t in BOTH for s in STYLE_NAMES]
        found += [fill(t, p, s) for p in thing.phrases for t in PHRASE_ONLY for s in STYLE_NAMES]
    return found
