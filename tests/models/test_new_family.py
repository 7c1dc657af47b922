"""A family of models from another package: one module with an entry point adds it."""

from __future__ import annotations

import pytest
import torch

import holdfast
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, list_models, load_model
from holdfast.models.family import FAMILIES
from plugins import installed

TOWERS = '''
from torch import nn

from holdfast.models.family import Built, Family, register


@register("tower:NAME")
class Towers(Family):
    """Linear layers on top of each other: `tower:3` has three before its head."""

    def build(self, spec, input_shape, num_outputs, data_dir):
        width = input_shape[0] * input_shape[1] * input_shape[2]
        layers = [nn.Flatten()]
        for _ in range(int(spec.name.removeprefix("tower:"))):
            layers += [nn.Linear(width, 16), nn.ReLU()]
            width = 16
        return Built(nn.Sequential(*layers, nn.Linear(width, num_outputs)), spec)  # the head is found
'''


@pytest.fixture
def towers(tmp_path):
    with installed(tmp_path, {"towers": ("holdfast.models", TOWERS)}, [FAMILIES]):
        yield holdfast.load_task("digits[0-4]")


def test_it_is_listed_loaded_renewed_and_read_again(towers, tmp_path):
    assert "tower:NAME" in list_models()
    torch.manual_seed(0)
    model = load_model("tower:2", towers)
    assert (model.head_name, model.num_outputs, len(model.blocks())) == ("5", 5, 2)
    assert model.fresh().facts().sha256 != model.facts().sha256
    model.save(tmp_path / "tower.safetensors")
    again = SplitModel.from_pretrained(tmp_path / "tower.safetensors", towers)
    assert again.facts().sha256 == model.facts().sha256


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(HoldfastError, match="tower:2"):
        load_model("tower:2", holdfast.load_task("digits[0-4]"))
