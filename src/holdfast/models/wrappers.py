"""Wrappers around a network, and the precision of its weights: removed, or refused with what to do.

Adversaries copy a network, replace its last layer and train its weights with gradients in float32. What other tools put
around a network (compilers, data parallelism, adapters) or do to its numbers (half precision, quantisation) would
change what is measured, or fail far from its cause.
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
from holdfast.models.introspection import duplicate, every_tensor, first_line, is_head

HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Precisions in which fine-tuning fails for reasons of its own: optimiser steps are rounded away or overflow."""

WRAPPERS = ("module", "_orig_mod")
"""Names that `torch.nn.DataParallel` and the like, and `torch.compile`, put before those of the network inside."""


@dataclass(frozen=True)
class Unwrapped:
    """A network without wrappers, in full precision.

    Attributes:
        network: the network that was given, where nothing had to change; else what is inside it, or a copy.
        notes: what was done, in sentences.
        head: the dotted name of the layer that was asked for, as it is now; None if none was, or it is gone.
    """

    network: nn.Module
    notes: tuple[str, ...] = ()
    head: str | None = None


def unwrapped(network: nn.Module, name: str, head: str | None = None) -> Unwrapped:
    """Takes a network out of its wrappers, merges adapters into it and casts half precision to float32.

    Args:
        network: left as it is; what has to be changed is changed in a copy.
        name: for messages.
        head: dotted name of a layer, whose new name is wanted.

    Raises:
        HoldfastError: if it is TorchScript, quantised, sharded, without values, or not of real dense numbers.

    Example:
        >>> wrapped = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)).half())
        >>> found = unwrapped(wrapped, "mine", "module.0")
        >>> found.head, found.network[0].weight.dtype, wrapped.module[0].weight.dtype
        ('0', torch.float32, torch.float16)
        >>> found.notes[1]
        'mine is stored in float16; it is attacked and written in float32.'
    """
    notes: list[str] = []
    inner = network
    while (kind := _wrapper(inner)) is not None:
        notes.append(f"{name} was wrapped in {kind}; the network inside is taken.")
        inner = _inside(inner)
        head = None if head is None else _without_first(head)
    _refuse(inner, name)
    todo = [change for change in _CHANGES if change.needed(inner, head)]
    if not todo:
        return Unwrapped(inner, tuple(notes), head)
    inner = duplicate(inner)
    for change in todo:
        inner = change.make(inner, name, notes, head)
        head = None if head is None else _renamed(inner, head)
    return Unwrapped(inner, tuple(notes), head)


@dataclass(frozen=True)
class _Change:
    needed: Callable[[nn.Module, str | None], bool]
    make: Callable[[nn.Module, str, list[str], str | None], nn.Module]


def _wrapper(network: nn.Module) -> str | None:
    """What kind of wrapper a module is; only the published classes themselves count, whatever calls itself so."""
    for module, attribute, shown in (
        ("torch._dynamo.eval_frame", "OptimizedModule", "torch.compile"),
        ("torch.nn.parallel", "DataParallel", "DataParallel"),
        ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel"),
        ("torch.optim.swa_utils", "AveragedModel", "AveragedModel"),
    ):
        kind = getattr(sys.modules.get(module), attribute, None)  # not imported: then nothing is of its kind
        if kind is not None and type(network) is kind:
            return shown
    return None


def _inside(wrapper: nn.Module) -> nn.Module:
    found: nn.Module = wrapper._modules.get("_orig_mod") or wrapper.module  # type: ignore[assignment]
    return found


def _without_first(dotted: str) -> str:
    first, _, rest = dotted.partition(".")
    return rest if first in WRAPPERS and rest else dotted


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
        where = f"{name}: {dotted or 'the network'!s} is {type(layer).__name__}"
        if isinstance(layer, torch.jit.ScriptModule):
            raise HoldfastError(
                f"{where}, TorchScript, whose layers cannot be replaced. Give the nn.Module that it was scripted or "
                "traced from; its weights are had with safetensors.torch.save_file(scripted.state_dict(), FILE)."
            )
        if _is_quantised(layer):
            raise HoldfastError(
                f"{where}, which is quantised: fine-tuning needs floating-point weights. Give the model as it was "
                "before it was quantised, or as its library dequantises it (model.dequantize())."
            )
        if type(layer).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise HoldfastError(
                f"{where}, which keeps a part of the weights only. Gather them (for FSDP: get_model_state_dict with "
                "full_state_dict=True), and load them into the plain network."
            )
        if any(_is_norm_hook(hook) for hook in layer._forward_pre_hooks.values()):
            raise HoldfastError(
                f"{where} with torch.nn.utils.weight_norm or spectral_norm, whose weights hooks compute and cannot be "
                "copied. Use those of torch.nn.utils.parametrizations, or call remove_weight_norm before the network "
                "is returned."
            )
        if getattr(layer, "_hf_hook", None) is not None and _spread(layer._hf_hook):
            raise HoldfastError(
                f"{where}, whose parts accelerate moves between devices; load the model without device_map."
            )
    for dotted, tensor in every_tensor(network):
        _refuse_tensor(f"{name}: the tensor {dotted!r}", tensor)


def _refuse_tensor(which: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise HoldfastError(f"{which} has no shape yet (a lazy layer); run the network once before it is returned.")
    if tensor.is_meta:
        raise HoldfastError(
            f"{which} has no values (it is on the meta device). Build the network on the CPU, and load its weights."
        )
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        more = "gather it with full_tensor()" if kind.__name__ == "DTensor" else "give the model as it was before that"
        raise HoldfastError(f"{which} is a {kind.__module__}.{kind.__name__}, no plain tensor; {more}.")
    if tensor.is_quantized or (isinstance(tensor, nn.Parameter) and _is_integer(tensor)):
        raise HoldfastError(
            f"{which} holds {str(tensor.dtype).removeprefix('torch.')}: it is quantised, and fine-tuning needs "
            "floating-point weights. Give the model as it was before it was quantised."
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
    while found := list(_nested(network)):  # one may be inside another
        for parent, child, layer, wrapper in found:
            parent._modules[child] = _inside(layer)
            wrappers.append(wrapper)
    notes.append(f"Layers of {name} were wrapped in {' and '.join(dict.fromkeys(wrappers))}; what is inside is taken.")
    return network


def _is_compiled(network: nn.Module, _: str | None) -> bool:
    return any(getattr(layer, "_compiled_call_impl", None) is not None for layer in network.modules())


def _uncompile(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    for layer in network.modules():
        layer._compiled_call_impl = None
    notes.append(f"{name} was compiled (module.compile()); it runs as it is written.")
    return network


def _adapter_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Layers that PEFT put in place of the network's own: parent, name, layer; the innermost last."""
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
    """Merges adapters into the weights that they are beside, as PEFT does."""
    made: Any = network
    try:
        if _peft_model(made):
            made = made.merge_and_unload(safe_merge=True)
        else:
            for parent, child, layer in list(_adapter_layers(made)):
                if hasattr(layer, "merge"):
                    layer.merge(safe_merge=True)
                    setattr(parent, child, layer.get_base_layer())
                else:
                    active = getattr(layer, "active_adapters", None) or [None]
                    kept = getattr(layer, "modules_to_save", {})
                    chosen = active[0] if active[0] in kept else None
                    setattr(parent, child, layer.original_module if chosen is None else kept[chosen])
    except Exception as error:  # there are dozens of kinds of adapters, and each refuses in its own way
        raise HoldfastError(
            f"{name} has a PEFT adapter that cannot be merged into its weights ({first_line(error)}). Merge it with "
            "merge_and_unload() where its kind allows it, and give the merged model; a kind that cannot be merged, "
            "such as prompt tuning, is no set of weights."
        ) from error
    if not isinstance(made, nn.Module) or _has_adapter(made, None):
        raise HoldfastError(
            f"{name} has a PEFT adapter of a kind that cannot be merged into its weights, such as prompt tuning; give "
            "a model without it."
        )
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(made).pop(attribute, None)
    made.requires_grad_(True)  # PEFT froze all but the adapter
    notes.append(f"{name} has a PEFT adapter; it was merged into the weights, and all of them may be trained.")
    return made


def _is_parametrised(network: nn.Module, head: str | None) -> bool:
    if head is None:
        return False
    layer = dict(network.named_modules()).get(head)
    return layer is not None and is_head(layer) and parametrize.is_parametrized(layer)


def _fold_head(network: nn.Module, name: str, notes: list[str], head: str | None) -> nn.Module:
    assert head is not None
    parent, _, leaf = head.rpartition(".")
    layer: Any = network.get_submodule(head)
    # A new layer: to remove the parametrization would change the class, which the layer shares with its original.
    like = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    made: Any = (
        nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **like)  # type: ignore[no-untyped-call]
        if isinstance(layer, nn.Linear)
        else nn.utils.skip_init(nn.Conv2d, layer.in_channels, layer.out_channels, 1, **like)  # type: ignore[no-untyped-call]
    )
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        if made.bias is not None:
            made.bias.copy_(layer.bias)
    setattr(network.get_submodule(parent), leaf, made)
    notes.append(f"The head of {name} computes its weights from others (a parametrization); they are plain ones now.")
    return network


def _has_inference(network: nn.Module, _: str | None) -> bool:
    return any(tensor.is_inference() for _, tensor in every_tensor(network))


def _from_inference(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    # Copying has made ordinary tensors of them.
    if _has_inference(network, None):
        raise HoldfastError(f"{name} holds tensors of torch.inference_mode; build it outside of that.")
    network.requires_grad_(True)
    notes.append(f"{name} was built in torch.inference_mode; its weights were copied, so that they can be trained.")
    return network


def _has_half(network: nn.Module, _: str | None) -> bool:
    return any(tensor.dtype in HALF for _, tensor in every_tensor(network))


def _widen(network: nn.Module, name: str, notes: list[str], _: str | None) -> nn.Module:
    found = [tensor for _, tensor in every_tensor(network) if tensor.dtype in HALF]
    stored = " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in found))
    with torch.no_grad():
        for tensor in found:
            tensor.data = tensor.data.float()  # in place: tied weights stay tied
            tensor.grad = None
    notes.append(f"{name} is stored in {stored}; it is attacked and written in float32.")
    return network


_CHANGES = (
    _Change(_is_compiled, _uncompile),
    _Change(lambda network, _: next(_nested(network), None) is not None, _unwrap_nested),
    _Change(_has_inference, _from_inference),
    _Change(_has_half, _widen),  # before adapters are merged: the sum is then not rounded
    _Change(_has_adapter, _merge),
    _Change(_is_parametrised, _fold_head),
)
