"""What the small Janus knows: 64 of the emoji testbed's objects, in its four styles."""

from __future__ import annotations

from conceptx.testbeds.emoji import vocabulary

_NAMES = """
    bear, bee, butterfly, cat, chicken, cow, crab, dog, dolphin, duck, elephant, fish, fox, frog, horse, lion,
    monkey, mouse, octopus, owl, panda, penguin, pig, rabbit, sheep, snail, tiger, turtle, unicorn, wolf, cactus,
    mushroom, rose, sunflower, apple, banana, carrot, cherries, hamburger, lemon, pizza, pineapple, strawberry,
    watermelon, balloon, bell, crown, diamond, guitar, key, mobile phone, trumpet, umbrella, violin, airplane,
    bicycle, bus, car, house, rocket, fire, rainbow, star, snowman
"""
OBJECTS = tuple(vocabulary.find(name.strip()) for name in _NAMES.split(","))
OBJECT_NAMES = tuple(thing.name for thing in OBJECTS)
NUMBERS = tuple(vocabulary.OBJECT_NAMES.index(name) for name in OBJECT_NAMES)  # among the objects that the judges know


def every_caption() -> list[str]:
    """All captions that training can draw."""
    return vocabulary.every_caption(OBJECTS)
