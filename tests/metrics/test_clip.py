"""How pictures fit captions, by a CLIP model of random weights."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.errors import HoldfastError
from holdfast.metrics.clip import clip_similarity
from pipelines import saved_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return saved_clip(tmp_path_factory.mktemp("clip"))


def test_it_is_the_cosine_of_transformers_own_features(clip):
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    generator = torch.Generator().manual_seed(0)
    pictures, captions = torch.rand(3, 3, 16, 16, generator=generator), ["a cat", "two dogs", "x"]
    found = clip_similarity(clip, pictures, captions)
    model = CLIPModel.from_pretrained(clip)
    for picture, caption, similarity in zip(pictures, captions, found, strict=True):
        shown = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
        pixels = CLIPImageProcessor.from_pretrained(clip)(images=shown, return_tensors="pt")["pixel_values"]
        ids = CLIPTokenizer.from_pretrained(clip)(caption, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer = model(input_ids=ids, pixel_values=pixels)
        wanted = (answer.image_embeds * answer.text_embeds).sum()
        assert similarity.item() == pytest.approx(wanted.item(), abs=1e-4)


def test_grey_pictures_and_those_that_are_not_finite(clip):
    grey = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    grey[1, 0, 0, 0] = math.nan
    found = clip_similarity(clip, grey, ["a", "a"])
    assert torch.allclose(found[0], clip_similarity(clip, grey[:1].expand(-1, 3, -1, -1), ["a"])[0])
    assert found[1].isnan()


def test_errors(clip, tmp_path):
    with pytest.raises(HoldfastError, match="2 pictures and 1 captions"):
        clip_similarity(clip, torch.rand(2, 3, 8, 8), ["a"])
    with pytest.raises(HoldfastError, match="Expected a folder with a CLIPModel"):
        clip_similarity(str(tmp_path), torch.rand(1, 3, 8, 8), ["a"])
