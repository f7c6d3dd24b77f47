"""Runs exported functions where nothing but jax, numpy and flatbuffers can be imported.

Arguments: a file of JSON with cases, and the npz file to write what each gives. A case has a
folder and either `prompts` to continue, or the tokens of rows, how many of each row's are its
prompt, in how many parts the prompt is taken, and how many further tokens are decoded.
"""

import importlib.util
import json
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"}


class JaxAlone(PathFinder):
    """Finds what jax brings, and no other package."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        # the standard library has a module whose name depends on the platform
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        return super().find_spec(fullname, path, target) if standard or top in ALLOWED else None


def load(folder):
    spec = importlib.util.spec_from_file_location("example", Path(folder) / "example.py")
    sys.modules["example"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(Path(folder))


def logits_of(model, tokens, counts, parts, decoded, context):
    """[rows, 1 + decoded, vocabulary]: after the prompt, and after each further token."""
    import numpy as np

    tokens, counts = np.array(tokens, np.int32), np.array(counts, np.int32)
    row, length = np.arange(len(tokens)), -(-counts.max() // parts)
    cache = model.zeros("cache", batch=len(tokens), context=context, kept=context)
    after = 0
    for first in range(0, parts * length, length):
        part, count = tokens[:, first : first + length], np.clip(counts - first, 0, length)
        logits, cache = model.prefill(cache, part, count)
        after = np.where(count[:, None] > 0, logits, after)
    steps = [after]
    for step in range(decoded):
        logits, cache = model.decode(cache, tokens[row, counts + step])
        steps.append(np.asarray(logits))
    return np.stack(steps, axis=1)


def main(cases, output):
    import numpy as np

    models, results = {}, {}
    for name, case in json.loads(Path(cases).read_text()).items():
        folder = case.pop("folder")
        if folder not in models:
            models[folder] = load(folder)
        model = models[folder]
        results[name] = model.generate(**case) if "prompts" in case else logits_of(model, **case)
    np.savez(output, **results)


if __name__ == "__main__":
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, JaxAlone]
    main(*sys.argv[1:])
