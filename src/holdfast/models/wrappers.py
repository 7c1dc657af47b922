"""Wrappers around a network are removed and its weights become float32, or it is refused with a remedy.

Adversaries copy a network, replace its last layer and train its weights with gradients in float32. What other tools put
around a network (compilers, data parallelism, adapters) or do to its numbers (half precision, quantisation) would
change the measurement, or raise errors that do not name the cause.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from holdfast.errors import HoldfastError
from holdfast.models.introspection import blank_layer, duplicate, every_tensor, first_line, is_head

HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Precisions that are too coarse for fine-tuning: optimiser steps are rounded away or overflow."""

WRAPPERS = ("module", "_orig_mod")
"""Names that `torch.nn.DataParallel` and the like, and `torch.compile`, put before those of the network inside."""


@dataclass(frozen=True)
class Unwrapped:
    """A network without wrappers, in full precision.

    Attributes:
        network: the given network if nothing had to change; else the one inside it, or a copy.
        notes: what was changed, in sentences.
        head: the new dotted name of the given layer; None: no layer was given, or it no longer exists.
    """

    network: nn.Module
    notes: tuple[str, ...] = ()
    head: str | None = None


def unwrapped(network: nn.Module, name: str, head: str | None = None) -> Unwrapped:
    """Takes a network out of its wrappers, merges adapters into it and casts half precision to float32.

    Args:
        network: left as it is; changes are made in a copy.
        name: for messages.
        head: dotted name of a layer whose new name is returned.

    Raises:
        HoldfastError: if it is TorchScript, quantised, sharded, without values, or not of real dense numbers.

    Example:
        >>> wrapped = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)).half())
        >>> plain = unwrapped(wrapped, "small", "module.0")
        >>> plain.head, plain.network[0].weight.dtype, wrapped.module[0].weight.dtype
        ('0', torch.float32, torch.float16)
        >>> plain.notes[1]
        'small is stored in float16; it is attacked and written in float32.'
    """
    notes: list[str] = []
    inner = network
    while (kind := _wrapper(inner)) is not None:
        notes.append(f"{name} was wrapped in {kind}; the network inside is taken.")
        inner = _inside(inner)
        first, _, rest = (head or "").partition(".")
        head = rest if first in WRAPPERS and rest else head
    _refuse(inner, name)
    changes = [change for needed, change in _CHANGES if needed(inner, head)]
    if changes:
        inner = duplicate(inner)
    for change in changes:
        inner = change(inner, name, notes, head)
        head = None if head is None else _renamed(inner, head)
    return Unwrapped(inner, tuple(notes), head)


def _wrapper(network: nn.Module) -> str | None:
    """The kind of a wrapper; only the published classes count, not others of the same name."""
    for module, attribute, shown in (
        ("torch._dynamo.eval_frame", "OptimizedModule", "torch.compile"),
        ("torch.nn.parallel", "DataParallel", "DataParallel"),
        ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel"),
        ("torch.optim.swa_utils", "AveragedModel", "AveragedModel"),
    ):
        kind = getattr(sys.modules.get(module), attribute, None)  # if it was not imported, no object has this class
        if kind is not None and type(network) is kind:
            return shown
    return None


def _inside(wrapper: nn.Module) -> nn.Module:
    inner: nn.Module = wrapper._modules.get("_orig_mod") or wrapper.module  # type: ignore[assignment]
    return inner


def _renamed(network: nn.Module, head: str) -> str | None:
    """The name of a layer in a network that lost its wrappers."""
    parts = head.split(".")
    candidates = (
        parts,
        [p for p in parts if p not in WRAPPERS],
        [p for p in head.removeprefix("base_model.model.").split(".") if p not in ("base_layer", *WRAPPERS)],
    )
    layers = dict(network.named_modules())
    for candidate in candidates:
        dotted = ".".join(candidate).partition(".modules_to_save.")[0].removesuffix(".original_module")
        if dotted in layers:
            return dotted
    return None


# What is refused


def _refuse(network: nn.Module, name: str) -> None:
    for dotted, layer in network.named_modules():
        label = f"{name}: {dotted or 'the network'!s} is {type(layer).__name__}"
        if isinstance(layer, torch.jit.ScriptModule):
            raise HoldfastError(
                f"{label}, TorchScript, whose layers cannot be replaced. Give the nn.Module that it was scripted or "
                "traced from; safetensors.torch.save_file(scripted.state_dict(), FILE) writes its weights."
            )
        if _is_quantised(layer):
            raise HoldfastError(
                f"{label}, which is quantised: fine-tuning needs floating-point weights. Give the model from before "
                "its quantisation, or let its library dequantise it (model.dequantize())."
            )
        if type(layer).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise HoldfastError(
                f"{label}, which keeps only a part of the weights. Gather them (for FSDP: get_model_state_dict with "
                "full_state_dict=True), and load them into the plain network."
            )
        if any(_is_norm_hook(hook) for hook in layer._forward_pre_hooks.values()):
            raise HoldfastError(
                f"{label} with torch.nn.utils.weight_norm or spectral_norm, whose hooks compute weights that cannot be "
                "copied. Use those of torch.nn.utils.parametrizations, or call remove_weight_norm before the network "
                "is returned."
            )
        if getattr(layer, "_hf_hook", None) is not None and _spread(layer._hf_hook):
            raise HoldfastError(
                f"{label}, whose parts accelerate moves between devices; load the model without device_map."
            )
    for dotted, tensor in every_tensor(network):
        _refuse_tensor(f"{name}: the tensor {dotted!r}", tensor)


def _refuse_tensor(which: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise HoldfastError(f"{which} has no shape yet (a lazy layer); run the network once before you return it.")
    if tensor.is_meta:
        raise HoldfastError(
            f"{which} has no values (it is on the meta device). Build the network on the CPU, and load its weights."
        )
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        remedy = "gather it with full_tensor()" if kind.__name__ == "DTensor" else "give the model with plain tensors"
        raise HoldfastError(f"{which} is a {kind.__module__}.{kind.__name__}, not a plain tensor; {remedy}.")
    if tensor.is_quantized or (isinstance(tensor, nn.Parameter) and _is_integer(tensor)):
        raise HoldfastError(
            f"{which} holds {str(tensor.dtype).removeprefix('torch.')}: it is quantised, and fine-tuning needs "
            "floating-point weights. Give the model from before its quantisation."
        )
    if tensor.layout != torch.strided:
        raise HoldfastError(f"{which} is sparse ({tensor.layout}); store it with to_dense().")
    if isinstance(tensor, nn.Parameter) and tensor.is_complex():
        raise HoldfastError(
            f"{which} is complex; only real weights are supported. Keep real and imaginary part as two tensors "
            "(torch.view_as_real)."
        )


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _is_quantised(layer: nn.Module) -> bool:
    home = type(layer).__module__
    return home.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "bitsandbytes", "hqq.", "gptqmodel", "awq"))


def _is_norm_hook(hook: Any) -> bool:
    return type(hook).__name__ in ("WeightNorm", "SpectralNorm") and type(hook).__module__.startswith("torch.nn.utils")


def _spread(hook: Any) -> bool:
    hooks = [hook, *getattr(hook, "hooks", ())]
    return any(getattr(h, "execution_device", None) is not None or getattr(h, "offload", False) for h in hooks)


# What is changed


def _nested(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    for parent in list(network.modules()):
        for child, layer in list(parent._modules.items()):
            if layer is not None and (wrapper := _wrapper(layer)) is not None:
                yield parent, child, layer, wrapper


def _unwrap_nested(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    wrappers = []
    while nested := list(_nested(network)):  # one may be inside another
        for parent, child, layer, wrapper in nested:
            parent._modules[child] = _inside(layer)
            wrappers.append(wrapper)
    kinds = " and ".join(dict.fromkeys(wrappers))
    notes.append(f"Layers of {name} were wrapped in {kinds}; the layers inside are taken.")
    return network


def _is_compiled(network: nn.Module, _: str | None) -> bool:
    return any(getattr(layer, "_compiled_call_impl", None) is not None for layer in network.modules())


def _uncompile(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    for layer in network.modules():
        layer._compiled_call_impl = None
    notes.append(f"{name} was compiled (module.compile()); it runs without compilation.")
    return network


def _adapter_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Layers that PEFT put in place of the network's own: parent, name, layer."""
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    kinds = tuple(
        kind
        for module, attribute in (
            (tuners, "BaseTunerLayer"), (others, "AuxiliaryTrainingWrapper"), (others, "ModulesToSaveWrapper"),
        )
        if isinstance(kind := getattr(module, attribute, None), type)
    )  # fmt: skip
    if kinds:
        for parent in list(network.modules()):
            for child, layer in list(parent._modules.items()):
                if isinstance(layer, kinds) and not isinstance(parent, kinds):
                    yield parent, child, layer


def _peft_model(network: nn.Module) -> bool:
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)
    return isinstance(kind, type) and isinstance(network, kind)


def _has_adapter(network: nn.Module, _: str | None) -> bool:
    return _peft_model(network) or next(_adapter_layers(network), None) is not None


def _merge(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    """Merges adapters into the weights that they adapt, as PEFT does."""
    merged: Any = network
    try:
        if _peft_model(merged):
            merged = merged.merge_and_unload(safe_merge=True)
        else:
            for parent, child, layer in list(_adapter_layers(merged)):
                if hasattr(layer, "merge"):
                    layer.merge(safe_merge=True)
                    setattr(parent, child, layer.get_base_layer())
                else:
                    active = getattr(layer, "active_adapters", None) or [None]
                    kept = getattr(layer, "modules_to_save", {})
                    chosen = active[0] if active[0] in kept else None
                    setattr(parent, child, layer.original_module if chosen is None else kept[chosen])
    except Exception as error:  # dozens of kinds of adapters raise different exceptions
        raise HoldfastError(
            f"{name} has a PEFT adapter that cannot be merged into its weights ({first_line(error)}). Merge it with "
            "merge_and_unload() where its kind allows it, and give the merged model; kinds that cannot be merged, "
            "such as prompt tuning, are not supported."
        ) from error
    if not isinstance(merged, nn.Module) or _has_adapter(merged, None):
        raise HoldfastError(
            f"{name} has a PEFT adapter of a kind that cannot be merged into its weights, such as prompt tuning; give "
            "a model without it."
        )
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(merged).pop(attribute, None)
    merged.requires_grad_(True)  # PEFT froze all but the adapter
    notes.append(f"{name} has a PEFT adapter; it was merged into the weights, and all of them may be trained.")
    return merged


def _is_parametrised(network: nn.Module, head: str | None) -> bool:
    if head is None:
        return False
    layer = dict(network.named_modules()).get(head)
    return layer is not None and is_head(layer) and parametrize.is_parametrized(layer)


def _fold_head(network: nn.Module, name: str, notes: list[str], head: str | None) -> nn.Module:
    assert head is not None
    parent, _, leaf = head.rpartition(".")
    layer: Any = network.get_submodule(head)
    # A new layer: removing the parametrization would change a class that the copy shares with the original.
    plain = blank_layer(layer, layer.weight.shape[0])
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    setattr(network.get_submodule(parent), leaf, plain)
    notes.append(f"The head of {name} computed its weights by a parametrization; they are plain ones now.")
    return network


def _has_inference(network: nn.Module, _: str | None) -> bool:
    return any(tensor.is_inference() for _, tensor in every_tensor(network))


def _from_inference(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    if _has_inference(network, None):  # copying has made ordinary tensors of most
        raise HoldfastError(f"{name} holds tensors of torch.inference_mode; build it outside of that mode.")
    network.requires_grad_(True)
    notes.append(f"{name} was built in torch.inference_mode; its weights were copied, so that they can be trained.")
    return network


def _has_half(network: nn.Module, _: str | None) -> bool:
    return any(tensor.dtype in HALF for _, tensor in every_tensor(network))


def _widen(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    half = [tensor for _, tensor in every_tensor(network) if tensor.dtype in HALF]
    stored = " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in half))
    with torch.no_grad():
        for tensor in half:
            tensor.data = tensor.data.float()  # in place: tied weights stay tied
            tensor.grad = None
    notes.append(f"{name} is stored in {stored}; it is attacked and written in float32.")
    return network


_Needed = Callable[[nn.Module, str | None], bool]
_CHANGES: tuple[tuple[_Needed, Callable[[nn.Module, str, list[str], str | None], nn.Module]], ...] = (
    (_is_compiled, _uncompile),
    (lambda network, _: next(_nested(network), None) is not None, _unwrap_nested),
    (_has_inference, _from_inference),
    (_has_half, _widen),  # before adapters are merged: the sum is then not rounded
    (_has_adapter, _merge),
    (_is_parametrised, _fold_head),
)
