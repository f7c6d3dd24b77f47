"""A run as the engine takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from seqeff.data import Tokenizer
    from seqeff.models import TransformerConfig


class TrainedModel(NamedTuple):
    """What an `Engine` needs of a run.

    Attributes:
      config: of the model, knowing its vocabulary.
      parameters: of the `Transformer`, on the devices here.
      mesh: of these; to be set, with `jax.set_mesh`, around what takes the parameters.
    """

    config: TransformerConfig
    tokenizer: Tokenizer
    parameters: Any
    mesh: Mesh


def load_run(
    run_dir: str | Path, *, checkpoint: int | None = None, overrides: Sequence[str] = ()
) -> TrainedModel:
    """A run's model, as `seqeff generate` reads it.

    Args:
      checkpoint: its step; None: the latest.
      overrides: bindings of gin, such as `"SeparatorAttention.separators=64"`.

    Raises:
      UserError: there is no such run, checkpoint or binding, or a file of it is damaged.
    """
    # training samples through this package
    from seqeff.config import load
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory
    from seqeff.training.restore import restore

    run = RunDirectory(Path(run_dir)).require()
    config = load(run.operative_config, overrides, module_paths=[run.modules]).root
    tokenizer = Tokenizer.load(run.tokenizer)
    program, parameters = restore(run, config, tokenizer, checkpoint)
    return TrainedModel(program.model, tokenizer, parameters, program.mesh)
