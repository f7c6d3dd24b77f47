"""A run's model as functions of StableHLO, which jax loads without this project."""

from seqeff.interop.stablehlo.exports import EXAMPLE, export_functions

__all__ = ["EXAMPLE", "export_functions"]
