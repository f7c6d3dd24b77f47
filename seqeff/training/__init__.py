"""Training: one loop, and the parts that a config chooses for it."""

from seqeff.training.config import MAY_CHANGE, Train
from seqeff.training.train import Outcome, train

__all__ = ["MAY_CHANGE", "Outcome", "Train", "train"]
