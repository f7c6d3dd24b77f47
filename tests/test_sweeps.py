"""A wandb agent's command line is ours: the agent's own code expands the sweep file."""

import dataclasses
import textwrap
from pathlib import Path

import pytest
import yaml
from wandb import wandb_agent

from seqeff import config

REPOSITORY = Path(__file__).parents[1]
SWEEP = REPOSITORY / "experiments/quickstart/sweep.yaml"

CONFIG_CLASSES = """
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Muon:
        learning_rate: float = 1e-3

    @dataclasses.dataclass(frozen=True)
    class SeparatorAttention:
        window: int = 64

    @dataclasses.dataclass(frozen=True)
    class Wandb:
        project: str = "seqeff"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Train:
        optimizer: Muon
        attention: SeparatorAttention
        tracker: Wandb | None = None
        seed: int = 0
        name: str | None = None
        deterministic: bool = False
        shape: tuple[int, ...] = ()
"""
GIN = """
    import sweep_configs
    Train.optimizer = @Muon()
    Train.attention = @SeparatorAttention()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "sweep_configs.py").write_text(textwrap.dedent(CONFIG_CLASSES))
    (tmp_path / "quickstart.gin").write_text(textwrap.dedent(GIN))
    monkeypatch.setattr(config, "PACKAGES", ())
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))


def agent_command(sweep, values, monkeypatch):
    """The command that `wandb agent` starts for a run with these parameter values."""
    started = []

    class Process:
        def __init__(self, command, **options):
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "r", "program": sweep["program"], "args": arguments})
    return started[0]


def choices(parameter):
    """The values, or the bounds, of a sweep file's parameter."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("pick", [min, max])
def test_the_quickstart_sweep(pick, monkeypatch):
    sweep = yaml.safe_load(SWEEP.read_text())
    values = {name: pick(choices(given)) for name, given in sweep["parameters"].items()}
    command = agent_command(sweep, values, monkeypatch)
    overrides, rest = config.split_overrides(command)
    assert rest == ["/usr/bin/env", "seqeff", "train", "configs/quickstart.gin"]
    monkeypatch.undo()
    train = config.load(REPOSITORY / rest[-1], overrides).root
    assert train.optimizer.learning_rate == values["gin.Muon.learning_rate"]
    assert train.model.attention.window == values["gin.SeparatorAttention.window"]
    assert train.seed == values["gin.Train.seed"]
    assert type(train.tracker).__name__ == "Wandb"


def test_the_sweep_minimizes_what_training_logs():
    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["metric"] == {"name": "validation/loss", "goal": "minimize"}
    assert not any("run-dir" in part for part in sweep["command"])


@pytest.mark.parametrize("arguments", ["${args}", "${args_no_equals}"])
def test_every_kind_of_value_survives_the_agent(arguments, monkeypatch):
    values = {
        "gin.Muon.learning_rate": 1e-05,
        "gin.Train.name": "a name",
        "gin.Train.deterministic": True,
        "gin.Train.tracker": None,
        "gin.Train.shape": [1, 2],
        "gin.Train.seed": 3,
    }
    sweep = {"program": "seqeff", "command": ["${env}", "${program}", "train", arguments]}
    overrides, rest = config.split_overrides(agent_command(sweep, values, monkeypatch))
    assert rest == ["/usr/bin/env", "seqeff", "train"]
    root = config.load("quickstart.gin", overrides).root
    assert dataclasses.asdict(root) == {
        "optimizer": {"learning_rate": 1e-05},
        "attention": {"window": 64},
        "tracker": None,
        "seed": 3,
        "name": "a name",
        "deterministic": True,
        "shape": (1, 2),
    }
