"""The body of any network as a list of blocks, which defines "the last block" and "the last half".

The rule is the same for every architecture. Walk through the modules in the order in which they are registered, and
open a module if

- it holds the head (the network itself always does),
- it is a plain container (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`), or
- it has layers inside and holds more than half of the body's parameters (a wrapper is not a block); embedding tables,
  which may be larger than all layers of a language model, do not count.

Every other module that holds a weight (a parameter of two axes or more) begins a block. A module without weights, such
as a normalisation, an activation or pooling, belongs to the block before it, or to the first block if it comes before
the first weight. So a block is a layer with what follows it in a plain network, and a residual block in a residual
network or a transformer. An opened module's own parameters, such as a class token, belong to no block.
"""

from __future__ import annotations

from torch import nn

from holdfast.errors import HoldfastError

Block = list[tuple[str, nn.Module]]
"""Modules with their dotted names, in order."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def split_blocks(network: nn.Module, head: str) -> list[Block]:
    """Returns the blocks of a network without its head.

    Args:
        network: any module.
        head: dotted name of the module that makes the logits, which is left out.

    Example:
        >>> body = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
        >>> network = nn.Sequential(body, nn.Linear(8, 2))
        >>> [[name for name, _ in block] for block in split_blocks(network, "1")]
        [['0.0', '0.1', '0.2'], ['0.3', '0.4', '0.5']]
    """
    makes_logits = network.get_submodule(head)
    total = _size(network, apart_from=makes_logits)
    blocks: list[Block] = []
    leading: Block = []
    seen: set[int] = {id(makes_logits)}

    def walk(module: nn.Module, prefix: str) -> None:
        for child, inner in module.named_children():
            name = prefix + child
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            within = any(True for _ in inner.children())
            wrapper = within and _is_weighted(inner) and 2 * _size(inner) > total and not is_normalisation(inner)
            if isinstance(inner, _CONTAINERS) or f"{head}.".startswith(f"{name}.") or wrapper:
                walk(inner, f"{name}.")
            elif _is_weighted(inner):
                blocks.append([*leading, (name, inner)])
                leading.clear()
            else:
                (blocks[-1] if blocks else leading).append((name, inner))

    walk(network, "")
    return blocks


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: one of torch's, or one with "norm" in its name and no weight matrix.

    Example:
        >>> is_normalisation(nn.BatchNorm2d(3)), is_normalisation(nn.Linear(3, 3))
        (True, False)
    """
    named = type(module).__name__.lower().rstrip("123d").endswith("norm")
    return isinstance(module, _NORMALISATIONS) or (named and not _is_weighted(module))


def copy_layers(into: nn.Module, source: nn.Module, names: list[str]) -> None:
    """Copies parameters and buffers of some layers from a network of the same architecture, in place.

    Args:
        into: the network to change.
        source: the network to copy from.
        names: dotted names of the layers.

    Raises:
        HoldfastError: if the source has no counterpart for any of a layer's parameters.
    """
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name in names:
        layer = into.get_submodule(name)
        own = {f"{name}.{n}": v for n, v in [*layer.named_parameters(), *layer.named_buffers()]}
        found = [n for n, v in own.items() if n in values and values[n].shape == v.shape]
        if any(True for _ in layer.parameters()) and not found:
            raise HoldfastError(
                f"Layer {name!r} cannot be initialised anew: a fresh model of this architecture has no tensor of that "
                "name and shape. Is the model's factory the one that built it?"
            )
        for n in found:
            own[n].data.copy_(values[n].data)


def _is_weighted(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _size(module: nn.Module, apart_from: nn.Module | None = None) -> int:
    left_out = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    # By identity: the head's weight may be that of an embedding, which is left out already.
    left_out |= set() if apart_from is None else {id(p) for p in apart_from.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in left_out)
