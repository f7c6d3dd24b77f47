"""Optimizers as configs that make optax transformations.

Parameters are a nested dict of arrays. Those under the top-level key "layers" carry a leading
axis of layers, so there a matrix has three axes and a norm's scale two.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from seqeff.checks import check_types, require


@runtime_checkable
class Optimizer(Protocol):
    """Config of an optimizer."""

    @property
    def learning_rate(self) -> float: ...

    def make(self, schedule: optax.Schedule, parameters: Any) -> optax.GradientTransformation:
        """The transformation from gradients to updates.

        Args:
          schedule: factor of the config's learning rates by number of updates taken.
          parameters: the tree that will be trained, of arrays or of their shapes.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (1711.05101), on matrices and embeddings only.

    Attributes:
      learning_rate: at the peak of the schedule.
      weight_decay: times the learning rate, as in PyTorch.
      gradient_clip: greatest global norm of the gradient; None: no clipping.
    """

    learning_rate: float = 6e-4
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_ranges(self)

    def make(self, schedule: optax.Schedule, parameters: Any) -> optax.GradientTransformation:
        return optax.chain(
            clip_by_global_norm(self.gradient_clip),
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay, mask=_are_matrices(parameters)),
            optax.scale_by_learning_rate(_scaled(self.learning_rate, schedule)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices of the layers, AdamW for all else.

    The last two axes of a parameter of the layers are its matrix; layers, and experts, are
    orthogonalised each on its own. Embeddings, the output head, norms and biases take Adam.

    Attributes:
      learning_rate: of the matrices, at the peak of the schedule.
      adam_learning_rate: of all else; None: the same.
      momentum: decay of the gradients' running mean.
      consistent_rms: root mean square of a matrix's update before the learning rate. At 0.2 it is
        that of Adam, and Adam's learning rates serve (2502.16982, section 2.2); None: scaled by
        sqrt(max(1, outputs / inputs)) as by Muon's author.
      weight_decay: times the learning rate; on matrices and embeddings only.
      adam_b1, adam_b2, epsilon: of Adam.
      gradient_clip: greatest global norm of the gradient; None: no clipping.
    """

    learning_rate: float = 2e-3
    adam_learning_rate: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    consistent_rms: float | None = 0.2
    weight_decay: float = 0.1
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    epsilon: float = 1e-8
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_ranges(self)

    def make(self, schedule: optax.Schedule, parameters: Any) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            learning_rate=_scaled(self.learning_rate, schedule),
            beta=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            consistent_rms=self.consistent_rms,
            muon_weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree
            ),
        )
        adam = AdamW(
            learning_rate=self.adam_learning_rate or self.learning_rate,
            b1=self.adam_b1,
            b2=self.adam_b2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            gradient_clip=None,
        )
        rule = jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if _in_layers(path) and leaf.ndim > 2 else "adam", parameters
        )
        return optax.chain(
            clip_by_global_norm(self.gradient_clip),
            optax.partition({"muon": muon, "adam": adam.make(schedule, parameters)}, rule),
        )


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, in float32."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def clip_by_global_norm(maximum: float | None) -> optax.GradientTransformation:
    """Scales a gradient whose `global_norm` exceeds the maximum down to it; None: identity.

    Inside one jitted step the norm shares its computation with `global_norm` of the same gradient.
    """
    if maximum is None:
        return optax.identity()

    def clip(gradients: Any, _: Any) -> Any:
        factor = maximum / jnp.maximum(global_norm(gradients), maximum)
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), gradients)

    return optax.stateless(clip)


def _in_layers(path: tuple[Any, ...]) -> bool:
    return path[0].key == "layers"


def _are_matrices(parameters: Any) -> Any:
    """True for the leaves that are matrices, or stacks of them, and not vectors."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim - _in_layers(path) >= 2, parameters
    )


def _scaled(learning_rate: float, schedule: optax.Schedule) -> optax.Schedule:
    return lambda count: learning_rate * schedule(count)


def _check_ranges(config: AdamW | Muon) -> None:
    name = type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("b1", "b2", "adam_b1", "adam_b2", "momentum"):
            require(0 <= value < 1, f"{name}.{field.name} = {value} must be in [0, 1)")
        elif field.name == "weight_decay":
            require(value >= 0, f"{name}.weight_decay = {value} must not be negative")
        elif field.name != "nesterov":
            require(value is None or value > 0, f"{name}.{field.name} = {value} must be above 0")
