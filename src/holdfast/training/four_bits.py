"""Linear layers with frozen weights of 4 bits, beside which QLoRA trains adapters (bitsandbytes, extra `qlora`).

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023): weights in NF4, whose 16 values are the
quantiles of a normal distribution, scaled for each 64 weights by their largest; these scales are quantised once more,
to 8 bits.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

PACKAGE: Final = "bitsandbytes"

BLOCK: Final = 64
"""Weights with one scale. They lie in one row: on processors bitsandbytes misreads blocks that span two of them."""


def not_installed() -> str | None:
    """Returns why layers cannot have weights of 4 bits here, or None if they can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f'weights of 4 bits need the package {PACKAGE}: pip install "holdfast[qlora]"'
    return None


def inputs_of(layer: nn.Module, *, transposed: bool) -> int:
    """Returns the number of inputs of a linear layer; `transposed` as in `quantise`."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[0 if transposed else 1]


def quantise(layer: nn.Module, *, transposed: bool, dtype: torch.dtype) -> nn.Module:
    """Returns a linear layer with the weights of another one in NF4, frozen, on the same device.

    Args:
        layer: an `nn.Linear`, or GPT-2's layer, whose number of inputs is a multiple of `BLOCK`; it is left as it is.
        transposed: whether its weight has the shape (inputs, outputs), as GPT-2's has.
        dtype: in which the new layer computes.
    """
    import bitsandbytes

    _count_products()
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    weight = (weight.detach().T if transposed else weight.detach()).contiguous()
    outputs, inputs = weight.shape
    made = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device=torch.device("meta")
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK, module=made
    )
    # On some processors it would pack the weights anew when a model is scored. The packed ones give adapters in earlier
    # layers no gradient, so that after the first score hardly anything would be trained.
    made.support_avx512bf16_for_cpu = False
    if isinstance(bias, Tensor):
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    made.train(layer.training)
    quantised: nn.Module = made.to(weight.device)  # only now are there 4 bits
    return quantised


@cache
def _count_products() -> None:
    """Lets torch's counter of operations see the forward pass of these layers, which is one operation of its own."""
    from torch.utils.flop_counter import register_flop_formula

    product = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    if product is None:  # versions before 0.50 multiply with the weights as they were before, which is counted
        return

    @register_flop_formula(product)
    def _(inputs: Sequence[int], packed: Any, shape: Sequence[int], *rest: Any, **named: Any) -> int:
        return 2 * math.prod(inputs) * shape[0]
