"""Which tensor of another framework holds which parameters of ours, and in what form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from seqeff.models import TransformerConfig
from seqeff.models.flops import abstract_model

_STACKED = "layers."


class Form(NamedTuple):
    """How one of their arrays is made of ours, and the way back."""

    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


SAME = Form(lambda array: [array], lambda parts: parts[0])
TRANSPOSED = Form(lambda array: [array.T], lambda parts: parts[0].T)


def concatenated(count: int) -> Form:
    """Ours, one after the other on the last axis, all of one size."""
    return Form(
        lambda array: np.split(array, count, axis=-1),
        lambda parts: np.concatenate(parts, axis=-1),
    )


def transposed_by_head(heads: int, count: int) -> Form:
    """Of each head the outputs of the first of ours, of the second and so on, then the next head's.

    Theirs is [heads * count * head_dim, inputs], each of ours [inputs, heads * head_dim]; biases
    lack the inputs.
    """

    def split(array: np.ndarray) -> Sequence[np.ndarray]:
        inputs = array.shape[1:]
        by_head = array.reshape(heads, count, -1, *inputs)
        return [by_head[:, part].reshape(-1, *inputs).T for part in range(count)]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        inputs = parts[0].T.shape[1:]
        by_head = np.stack([part.T.reshape(heads, -1, *inputs) for part in parts], axis=1)
        return by_head.reshape(-1, *inputs)

    return Form(split, join)


def after_unused_rows(count: int) -> Form:
    """Ours, below so many rows that nothing reads: lost on the way in, zero on the way out."""
    return Form(
        lambda array: [array[count:]],
        lambda parts: np.concatenate([np.zeros_like(parts[0][:1]).repeat(count, 0), parts[0]]),
    )


class Tensor(NamedTuple):
    """One of their tensors, or with `{layer}` in its name one a layer.

    Attributes:
      theirs: its name.
      ours: dotted paths of the parameters in it. A model that has none of them has no such tensor.
      form: how it is made of them.
      aliases: other names that it has in some files.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = SAME
    aliases: tuple[str, ...] = ()


def linear(theirs: str, ours: str, form: Form = TRANSPOSED) -> list[Tensor]:
    """Weight and bias of a linear map."""
    return fused_linear(theirs, (ours,), form)


def fused_linear(theirs: str, ours: Sequence[str], form: Form) -> list[Tensor]:
    """Weight and bias of several linear maps of one input."""
    return [
        Tensor(f"{theirs}.{their}", tuple(f"{path}.{our}" for path in ours), form)
        for their, our in (("weight", "kernel"), ("bias", "bias"))
    ]


def norm(theirs: str, ours: str) -> list[Tensor]:
    """Weight and bias of a norm."""
    return [
        Tensor(f"{theirs}.{their}", (f"{ours}.{our}",))
        for their, our in (("weight", "scale"), ("bias", "bias"))
    ]


class Placement(NamedTuple):
    """One tensor of a model: its names, its shape there, and what of ours it holds."""

    theirs: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    layer: int | None
    form: Form

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs, *self.aliases)

    def read(self, parameter: Callable[[str, int | None], np.ndarray]) -> np.ndarray:
        """Their array, from our parameters by dotted path and layer; None: of no layer."""
        return self.form.join([parameter(path, self.layer) for path in self.ours])

    def write(self, parameters: Mapping[str, np.ndarray], array: np.ndarray) -> None:
        """Fills our parameters from their array."""
        for path, part in zip(self.ours, self.form.split(array), strict=True):
            of_layer(parameters[path], self.layer)[...] = part


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its dotted path; those of the layers are stacked."""
    state = nnx.to_pure_dict(nnx.split(abstract_model(config))[1])
    return {name: leaf.shape for name, leaf in by_name(state).items()}


def of_layer(array: np.ndarray, layer: int | None) -> np.ndarray:
    """A layer's own of what is stacked; None: all of what is of no layer."""
    return array if layer is None else array[layer]


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path, in its order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from dotted paths."""
    tree: dict[str, Any] = {}
    for path, value in parameters.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


def without_place(tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters of a model that no tensor of a family can hold.

    Args:
      shapes: of the parameters (`parameter_shapes`).
    """
    return sorted(shapes.keys() - {path for held in _held(tensors, shapes) for path in held.ours})


def placements(tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Placement]:
    """The tensors that a model of a family has.

    Args:
      shapes: of its parameters (`parameter_shapes`).
    """
    return [placed for tensor in _held(tensors, shapes) for placed in _placed(tensor, shapes)]


def _held(tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    return [tensor for tensor in tensors if all(path in shapes for path in tensor.ours)]


def _placed(tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Placement]:
    layers: Sequence[int | None] = [None]
    own = [shapes[path] for path in tensor.ours]
    if tensor.ours[0].startswith(_STACKED):
        layers = range(own[0][0])
        own = [shape[1:] for shape in own]
    # a byte an entry: only the shape is wanted
    shape = tensor.form.join([np.zeros(part, np.uint8) for part in own]).shape
    for layer in layers:
        name, *aliases = (name.format(layer=layer) for name in (tensor.theirs, *tensor.aliases))
        yield Placement(name, tuple(aliases), shape, tensor.ours, layer, tensor.form)
