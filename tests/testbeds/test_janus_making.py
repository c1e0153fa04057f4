"""How the small Janus is made: tokenizer, losses and stages, without the trained weights."""

import pytest
import torch
from torch.nn import functional as F

from conceptx.testbeds.emoji.vocabulary import OBJECTS, STYLES
from conceptx.testbeds.janus import networks
from conceptx.testbeds.janus.training import (
    Schedule,
    Workshop,
    decoder_loss,
    directions,
    plain_loss,
    quantiser_loss,
)

SHORT = Schedule(plain=2, quantiser=2, decoder=2, pictures=8, captions=4, variations=1)


@pytest.fixture(scope="module")
def drawings():
    """Random drawings in place of the vendors': noise that is opaque in the middle."""
    torch.manual_seed(0)
    colours = torch.rand(len(OBJECTS), len(STYLES), 3, 6, 6)
    colours = F.interpolate(colours.flatten(0, 1), 96).unflatten(0, colours.shape[:2])
    alpha = torch.zeros(96, 96)
    alpha[16:80, 16:80] = 1
    return torch.cat([colours * alpha, alpha.expand(len(OBJECTS), len(STYLES), 1, 96, 96)], 2)


@pytest.fixture(scope="module")
def workshop(drawings, tmp_path_factory):
    return Workshop(drawings, tmp_path_factory.mktemp("janus"), SHORT)


def test_a_prompt_survives_the_tokenizer_with_its_special_tokens():
    tokenizer = networks.build_tokenizer()
    ids = tokenizer(f"{networks.USER}an emoji of a Polar bear{networks.ASSISTANT}{networks.BEGIN}").input_ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:2] == [networks.BOS, networks.USER] and words[-2:] == [networks.ASSISTANT, networks.BEGIN]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "an emoji of a polar bear"
    again = networks.build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()


def test_codes_have_unit_length_and_pictures_are_read_as_the_class_reads_them(workshop):
    """The class takes the nearest code of a state that has not unit length: for unit codes that of least angle."""
    module = workshop.quantiser
    codes = module.quantize.embedding.weight
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)), atol=1e-5)
    images = workshop.images(7)
    with torch.no_grad():
        nearest = (directions(module, images).permute(0, 2, 3, 1) @ codes.T).argmax(-1).flatten(1)
        assert (module.encode(images).image_tokens.view(len(images), -1) == nearest).float().mean() > 0.99
        assert torch.isfinite(plain_loss(module, images)) and torch.isfinite(quantiser_loss(module, images))


def test_gradients_pass_the_codes_straight_through(workshop):
    module = networks.build_model(workshop.tokenizer).model.vqmodel
    quantiser_loss(module, workshop.images(0)).backward()
    assert module.encoder.conv_in.weight.grad.any() and module.quantize.embedding.weight.grad.any()


def test_a_tenth_of_the_captions_is_masked_as_the_class_masks(workshop):
    data = [workshop._told(step) for step in range(40)]
    begin = workshop.tokenizer.convert_tokens_to_ids(networks.BEGIN)
    rows = [row[mask.bool()] for part in data for row, mask in zip(part["ids"], part["mask"], strict=True)]
    masked = [row for row in rows if bool((row[1:-1] == workshop.tokenizer.pad_token_id).all())]
    assert 0.02 < len(masked) / len(rows) < 0.2  # 160 rows, standard error .024
    assert all(row[0] == workshop.tokenizer.bos_token_id and row[-1] == begin for row in rows)


def test_the_decoder_is_asked_for_each_token_after_those_before_it(workshop):
    """A changed last token changes its own term alone."""
    model, data = workshop.model, workshop._told(0)
    before = decoder_loss(model, data)
    assert float(before) == pytest.approx(torch.tensor(float(networks.CODES)).log().item(), abs=1.0)
    codes = data["codes"].clone()
    codes[:, -1] = (codes[:, -1] + 1) % networks.CODES
    after = decoder_loss(model, {**data, "codes": codes})
    assert 0 < abs(float(after - before)) < 5 / 64


def test_every_stage_is_a_file_that_is_not_made_twice(drawings, workshop, tmp_path):
    from conceptx.testbeds.janus import load
    from conceptx.testbeds.janus.shipping import draw, reconstruction, ship

    ship(workshop, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in workshop.folder.iterdir()}
    again = Workshop(drawings, workshop.folder, SHORT)
    ship(again, tmp_path / "out")
    assert times == {path: path.stat().st_mtime_ns for path in workshop.folder.iterdir()}
    model, processor = load(source=tmp_path / "out")
    images = draw(model, processor, ["a noto dog", "an owl"], guidance=3.0)
    assert images.shape == (2, 3, 32, 32) and bool(images.isfinite().all())
    found = reconstruction(again, rounds=1)
    assert found["n"] == 256 and 0 < found["used"] <= networks.CODES
