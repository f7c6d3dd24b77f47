"""Continues a prompt greedily with the model beside this file; jax and flatbuffers suffice.

python example.py "The cat"     # text, where the package tokenizers is installed
python example.py 17 3 8        # ids of tokens
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# sizes are multiples of it, as each compiles anew
ROUNDED = 256


class Model:
    """The functions of a directory.

    Attributes:
      about: its `model.json`.
      prefill: of cache, tokens [batch, length] and how many of each row's are real.
      decode: of cache and token [batch]. Both give logits [batch, vocabulary] of the next token,
        and the cache after, in place of the one before.
    """

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self._weights = []
        if "weights" in self.about["arrays"]:
            specs = self.about["arrays"]["weights"]
            self._weights.append(read_weights(folder / "model.safetensors", specs))
        self.prefill = self._function(folder / "prefill.exported")
        self.decode = self._function(folder / "decode.exported")

    def _function(self, file: Path) -> Callable[..., Any]:
        exported = export.deserialize(bytearray(file.read_bytes()))

        def call(cache: Any, weights: Any, *tokens: Any) -> Any:
            return exported.call(*weights, cache, *tokens)

        compiled = jax.jit(call, donate_argnums=0)
        return lambda cache, *tokens: compiled(cache, self._weights, *tokens)

    def zeros(self, name: str, **sizes: int) -> Any:
        """An argument of zeros, with the sizes that are free. A cache of zeros has no tokens."""

        def make(spec: Any) -> Any:
            if "shape" in spec:
                shape: Any = [sizes.get(size, size) for size in spec["shape"]]
                return np.zeros(shape, jnp.dtype(spec["dtype"]))
            return {name: make(part) for name, part in spec.items()}

        return make(self.about["arrays"][name])

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """The ids of so many tokens after each prompt; [prompts, count]."""
        longest = max(map(len, prompts))
        length, room = _rounded(longest), _rounded(longest + count)
        sizes = {"batch": len(prompts), "length": length, "context": room, "kept": room}
        tokens, counts = self.zeros("tokens", **sizes), self.zeros("count", **sizes)
        if longest > tokens.shape[1]:
            raise SystemExit(f"a prompt has {longest} tokens, of {tokens.shape[1]} it may have")
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], counts[row] = prompt, len(prompt)
        logits, cache = self.prefill(self.zeros("cache", **sizes), tokens, counts)
        drawn = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
        finite = [jnp.isfinite(logits).all()]
        while len(drawn) < count:
            logits, cache = self.decode(cache, drawn[-1])
            drawn.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
            finite.append(jnp.isfinite(logits).all())
        if not all(map(bool, finite)):
            raise SystemExit("more tokens than the cache or the positions have room for")
        return np.stack(drawn, axis=1)[: len(prompts)]


def read_weights(file: Path, specs: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays of a safetensors file: the length of a header, the header, and all bytes."""
    content = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    weights = {}
    for name, spec in specs.items():
        first, end = (start + offset for offset in header[name]["data_offsets"])
        array = content[first:end].view(jnp.dtype(spec["dtype"]))
        weights[name] = jnp.asarray(array.reshape(spec["shape"]))
    return weights


def _rounded(size: int) -> int:
    return -(-size // ROUNDED) * ROUNDED


def main() -> None:
    """Prints a prompt with its continuation."""
    folder, words = Path(__file__).parent, sys.argv[1:]
    model = Model(folder)
    begin, ends = model.about["begin_of_text"], set(model.about["ends_of_text"])
    tokenizer = None
    if words and all(map(str.isdecimal, words)):
        prompt = [int(word) for word in words]
    else:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompt = [begin, *tokenizer.encode(" ".join(words), add_special_tokens=False).ids]
    drawn = model.generate([prompt], 40)[0].tolist()
    tokens = [*prompt, *itertools.takewhile(lambda token: token not in ends, drawn)]
    print(*tokens) if tokenizer is None else print(tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
