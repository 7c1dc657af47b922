"""BatchNorm that was folded into the convolutions, and gets statistics of its own again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, load_model
from holdfast.models.batchnorm import is_folded
from holdfast.tasks import load_task


@pytest.fixture(scope="module")
def digits():
    return load_task("digits[0-4]")


@pytest.fixture
def folded(digits, tmp_path):
    """A file of a CNN whose BatchNorm layers only shift, and whose activations are far from mean 0 and variance 1.

    Returns the file and some images.
    """
    torch.manual_seed(0)
    model = load_model("cnn", digits).eval()
    with torch.no_grad():
        for layer in model.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.normal_()
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(3.0)
                if layer.bias is not None:
                    layer.bias.add_(1.0)
    model.save(tmp_path / "folded.safetensors")
    x = next(digits.sweep("test", 60, device=torch.device("cpu"))).x
    return str(tmp_path / "folded.safetensors"), x


def test_evaluation_mode_stays_and_training_mode_follows_it(folded, digits):
    file, x = folded
    plain = load_model(ModelSpec(name="cnn", weights=file), digits).eval()
    unfolded = load_model(ModelSpec(name="cnn", weights=file, unfold_batchnorm=True), digits).eval()
    wanted = plain(x)
    torch.testing.assert_close(unfolded(x), wanted, rtol=1e-3, atol=1e-3)
    train = next(digits.sweep("train", 250, device=torch.device("cpu"))).x
    with torch.no_grad():
        answers = {model: (model.eval()(train), model.train()(train)) for model in (plain, unfolded)}
    gaps = {model: float((trained - kept).norm() / kept.norm()) for model, (kept, trained) in answers.items()}
    assert gaps[unfolded] < 0.2 * gaps[plain]


def test_a_note_says_that_batchnorm_is_folded(folded, digits):
    file, _ = folded
    plain = load_model(ModelSpec(name="cnn", weights=file), digits)
    assert any("unfold_batchnorm" in note for note in plain.notes)
    assert is_folded(plain.network)
    unfolded = load_model(ModelSpec(name="cnn", weights=file, unfold_batchnorm=True), digits)
    assert not any("unfold_batchnorm" in note for note in unfolded.notes)
    assert not is_folded(unfolded.network)
    assert not is_folded(load_model("cnn", digits).network)


def test_what_is_saved_needs_no_samples(folded, digits, tmp_path):
    file, x = folded
    unfolded = load_model(ModelSpec(name="cnn", weights=file, unfold_batchnorm=True), digits).eval()
    unfolded.save(tmp_path / "unfolded.safetensors")
    again = load_model(str(tmp_path / "unfolded.safetensors"), digits).eval()
    torch.testing.assert_close(again(x), unfolded(x))


def test_a_network_without_batchnorm_is_refused(digits):
    with pytest.raises(HoldfastError, match="none; leave it out"):
        load_model(ModelSpec(name="cnn", options={"norm": "none"}, unfold_batchnorm=True), digits)
