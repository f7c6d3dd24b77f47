"""Tasks of lm-evaluation-harness in local files, one for each kind of request, and models."""

import functools
import random

import jax
import pytest
from hugging_face import model_of
from tiny_run import WORDS, sentence, write_json_lines

from seqeff import config
from seqeff.data import Tokenizer
from seqeff.runs import RunDirectory

TASKS = ("local_choice", "local_word", "local_text", "local_answer")
# texts go past the context of every run of the tests
_DOCUMENTS = 9
_COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
fewshot_split: train
metadata:
  version: 2.0
"""
_OWN = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_word": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", " t"], max_gen_toks: 13, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def write_tasks(folder):
    """A folder with the YAML files of `TASKS`, and their data in it."""
    choose = random.Random(0)
    rows = [
        {
            "question": "" if number == 4 else sentence(choose)[: 9 * number + 1],
            "choices": [".", " ", *(f" {word}" for word in WORDS), " mat and the", "dóg"],
            "gold": number % 5,
            "text": " ".join(sentence(choose) for _ in range(number + 1)) + " the",
            "answer": choose.choice(WORDS),
        }
        for number in range(_DOCUMENTS)
    ]
    folder.mkdir()
    data = write_json_lines(folder / "data.jsonl", rows)
    for name in TASKS:
        text = _COMMON.format(name=name, data=data) + _OWN[name]
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def harness_model(path, chat=None, change=lambda x: x):
    """The model of a run directory, four rows at a time, with every parameter changed so."""
    from seqeff.evaluation.harness._model import HarnessModel

    run = RunDirectory(path)
    tokenizer = Tokenizer.load(run.tokenizer)
    train = config.load(run.operative_config).root
    return HarnessModel(
        train.model.for_vocabulary(tokenizer.vocabulary()),
        jax.tree.map(change, model_of(path)[1]),
        tokenizer,
        context=train.data.sequence_length,
        slots=4,
        chat=chat,
    )


@pytest.fixture
def local_tasks(monkeypatch):
    """Without the harness's own tasks, which take seconds to list."""
    import lm_eval.tasks

    local = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", local)
