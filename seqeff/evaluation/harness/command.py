"""`seqeff eval --harness`: the tasks, their seeds, and what a report keeps of their results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqeff.checks import UserError
from seqeff.data.files import nearest

# times that documents are drawn anew for the standard errors of what is no mean
_RESAMPLED = 1000
# what a task's hash is of
_HASHED = ("doc", "prompt", "target")
# attributes of tasks that are more than text in and text out
_REFUSED = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "is not of text alone"}


class Loaded(NamedTuple):
    """Tasks with their data.

    Attributes:
      tasks: what the harness's `evaluate` takes.
      seeds: of what draws the examples, by its name.
    """

    tasks: Any
    seeds: Mapping[str, int]


def load_tasks(
    names: Sequence[str], *, include: Path | None, shots: int | None, seed: int | None
) -> Loaded:
    """Tasks and groups; their data are downloaded where they are not local.

    Args:
      names: tasks, groups, tags, patterns of them, or YAML files.
      include: a folder whose YAML files are tasks too.
      shots: examples before each question, but for tasks whose own file says 0; None: as they say.
      seed: None: those that are usual in the harness.

    Raises:
      UserError: lm-evaluation-harness is absent; a task is unknown, cannot be loaded, or needs
        more than a language model.
    """
    seeds = _seed(seed)
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder")
    manager = TaskManager(include_path=include)
    specs = [spec for name in names for spec in _meant(manager, name)]
    loaded = _load(manager, list(dict.fromkeys(specs)))
    for name, task in loaded["tasks"].items():
        for refused, what in _REFUSED.items():
            if getattr(task, refused, False):
                raise UserError(f"--harness {name}: this task {what}, which is not done here")
        own = task.get_config("num_fewshot")
        if shots and own == 0:
            print(
                f"seqeff: {name} has no examples by its own file, with --shots too", file=sys.stderr
            )
        elif shots is not None or own is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=seeds["shots"])
    return Loaded(loaded, seeds)


def evaluate(model: Any, tasks: Any, limit: int | None, *, chat: bool = False) -> Mapping[str, Any]:
    """What the harness finds.

    Args:
      model: an `lm_eval.api.model.LM`.
      tasks: those loaded.
      limit: documents of each task; None: all.
      chat: whether the model's chat template makes the prompts, examples as turns before.

    Raises:
      UserError: a task cannot be scored.
    """
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]

    # standard errors come from a pool of forks otherwise, which the threads of JAX may hang
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = evaluator.evaluate(
                lm=model,
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=_RESAMPLED,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    except Exception as error:
        if isinstance(error, UserError) or _is_ours(error):
            raise
        raise UserError(
            f"--harness: a task failed: {type(error).__name__}: {error}; see to its file and data "
            "(of which --shots N takes N examples for each question)"
        ) from error
    return found


def _is_ours(error: Exception) -> bool:
    """Whether an error comes from under this package, and not from the harness or a task."""
    package = Path(__file__).parents[2]
    _, *under = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).is_relative_to(package) for frame in under)


def table(found: Mapping[str, Any]) -> str:
    """The harness's own tables of tasks and of groups."""
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    columns = ["results", *(["groups"] if found.get("groups") else [])]
    return "\n".join(make_table(found, column) for column in columns).rstrip()


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An object a task or group, with `metrics` by the harness's names, METRIC,FILTER.

    Where it has no standard error, that is None.

    A task's `sha256` is of its documents, prompts and targets, as the harness's own `task_hashes`.
    """
    samples, made = found.get("samples", {}), []
    for name, result in found["results"].items():
        row = {
            "task": name,
            "version": found["versions"].get(name),
            "shots": found["n-shot"].get(name),
            "metrics": {
                key: None if value == "N/A" else value
                for key, value in result.items()
                if "," in key
            },
        }
        if name in samples:
            hashes = "".join(sample[f"{kind}_hash"] for sample in samples[name] for kind in _HASHED)
            row |= {
                "documents": found["n-samples"][name]["effective"],
                "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
                "config": found["configs"][name],
            }
        made.append(row)
    return json.loads(json.dumps(made, default=_plain))


def _seed(seed: int | None) -> Mapping[str, int]:
    """Seeds Python's and NumPy's draws, and says what with."""
    try:
        from lm_eval import defaults  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            "--harness needs lm-evaluation-harness: pip install 'seqeff[harness]'"
        ) from error
    usual = {
        "random": defaults.DEFAULT_RANDOM_SEED,
        "numpy": defaults.DEFAULT_OTHER_SEED,
        "shots": defaults.DEFAULT_OTHER_SEED,
    }
    seeds = {name: value if seed is None else seed for name, value in usual.items()}
    random.seed(seeds["random"])
    np.random.seed(seeds["numpy"])
    return seeds


def _meant(manager: Any, name: str) -> list[str]:
    """The tasks that a name means.

    Raises:
      UserError: there are none.
    """
    if Path(name).is_file():
        return [str(Path(name).absolute())]
    if matches := manager.match_tasks([name]):
        return matches
    raise UserError(
        f"--harness {name}: no such task{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` "
        "lists the harness's own, --include-path DIR adds those of the YAML files there, and a "
        "YAML file may stand for its name"
    )


def _load(manager: Any, specs: list[str]) -> Any:
    try:
        return manager.load(specs)
    except ConnectionError as error:
        raise UserError(
            f"--harness: {error}; a task's data are downloaded once: see to the network, or give "
            "tasks of local files"
        ) from error
    # tasks are YAML and Python of anyone's, and raise anything
    except Exception as error:
        # what reads its data may say only that it failed
        said = [f"{type(x).__name__}: {x}" for x in (error, error.__cause__) if x is not None]
        raise UserError(f"--harness: a task cannot be loaded: {'; '.join(said)}") from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
