"""Pictures of a concept: found beside its file, read as tensors, and refused in one sentence when they are wrong."""

import json

import pytest
import torch
from PIL import Image

from conceptx import Concept
from conceptx.concept import pictures


def picture(path, colour, size=(4, 2), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return str(path)


def test_a_concept_file_names_pictures_beside_it(tmp_path):
    picture(tmp_path / "shots" / "a.png", (255, 0, 51))
    mask = Image.new("L", (4, 2), 127)
    mask.putpixel((3, 1), 128)
    mask.save(tmp_path / "shots" / "a-mask.png")
    (tmp_path / "cat.toml").write_text('name = "cat"\nimages = ["shots/a.png"]\nmasks = ["shots/a-mask.png"]\n')
    concept = Concept.load(tmp_path / "cat.toml")
    images, masks = pictures(concept)
    assert images.shape == (1, 3, 2, 4) and masks.shape == (1, 1, 2, 4)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert masks.sum() == 1 and masks[0, 0, 1, 3] == 1  # at least half as light as white
    assert Concept(**json.loads(concept.model_dump_json())) == concept


def test_without_masks_the_whole_picture_counts(tmp_path):
    concept = Concept("cat", images=[picture(tmp_path / f"{n}.png", n, mode="L") for n in (0, 255)])
    images, masks = pictures(concept)
    assert images[0].max() == 0 and images[1].min() == 1 and masks.shape == (2, 1, 2, 4) and masks.min() == 1


@pytest.mark.parametrize(
    "fields,error,message",
    [
        ({"images": ["a.jpg"]}, ValueError, "must be a PNG file, got 'a.jpg'"),
        ({"images": ["a.png"], "masks": ["b.png", "c.png"]}, ValueError, "1 images and 2 masks"),
        ({"masks": ["b.png"]}, ValueError, "0 images and 1 masks"),
    ],
)
def test_names_that_do_not_fit(fields, error, message):
    with pytest.raises(error, match=message):
        Concept("cat", **fields)


@pytest.mark.parametrize(
    "line,error,message",
    [
        ('images = ["../a.png"]', ValueError, "picture file '../a.png' lies outside the concept's folder"),
        ('images = ["no.png"]', FileNotFoundError, "There is no picture file .*no.png"),
        ("images = [3]", ValueError, "name of a picture file must be a text, got 3"),
        ('masks = "a.png"', ValueError, "masks must be a list of files, got 'a.png'"),
    ],
)
def test_files_that_are_not_there(tmp_path, line, error, message):
    (tmp_path / "cat.toml").write_text(f'name = "cat"\n{line}\n')
    with pytest.raises(error, match=message):
        Concept.load(tmp_path / "cat.toml")


def test_pictures_that_cannot_be_used(tmp_path):
    good, large = picture(tmp_path / "a.png", 255, mode="L"), picture(tmp_path / "b.png", 0, (8, 8), "L")
    broken, dark = tmp_path / "c.png", picture(tmp_path / "d.png", 100, mode="L")
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:40])
    wrong = [
        ({}, ValueError, "has no images"),
        ({"images": [good, large]}, ValueError, "different sizes"),
        ({"images": [good], "masks": [large]}, ValueError, "size is not that of the images"),
        ({"images": [good], "masks": [dark]}, ValueError, "dark throughout"),
        ({"images": [str(broken)]}, ValueError, "c.png is not a whole picture"),
        ({"images": [str(tmp_path / "e.png")]}, FileNotFoundError, "There is no picture file"),
    ]
    for fields, error, message in wrong:
        with pytest.raises(error, match=message):
            pictures(Concept("cat", **fields))
