"""Generation by transformers with its static cache, at the shape of `seqeff bench generate`.

    python experiments/generation_speed/transformers_static.py --json transformers.json

Needs torch, transformers and an NVIDIA GPU. Random bfloat16 weights and prompts; transformers
compiles the steps itself. The median of seven runs after one that compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

_PROMPT, _TOKENS, _BATCHES, _REPEATS = 1024, 128, (1, 64), 7


def main() -> None:
    """Prints tokens a second, prompts included."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=32768,
        rotary_pct=0.25,
        attn_implementation="sdpa",
    )
    model = GPTNeoXForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.generation_config.pad_token_id = 0
    for batch in _BATCHES:
        prompt = torch.randint(0, config.vocab_size, (batch, _PROMPT), device="cuda")
        seconds = []
        for _ in range(1 + _REPEATS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(
                prompt,
                max_new_tokens=_TOKENS,
                min_new_tokens=_TOKENS,
                do_sample=False,
                cache_implementation="static",
            )
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        facts = {"batch": batch, "prompt": _PROMPT, "tokens": _TOKENS, "all_seconds": seconds[1:]}
        results.append(facts | {"whole_tokens_per_second": round(batch * _TOKENS / median)})
        print(f"batch {batch}: {median:.3f} s, {batch * _TOKENS / median:,.0f} tokens/s")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "results": results}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
