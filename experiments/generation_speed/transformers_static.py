"""Generation by transformers with its static cache, at the shape of `seqeff bench generate`.

    python experiments/generation_speed/transformers_static.py

Needs torch, transformers and an NVIDIA GPU. Random bfloat16 weights and prompts; transformers
compiles the steps itself. The median of three runs after one that compiles.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

_PROMPT, _TOKENS, _BATCHES, _REPEATS = 1024, 128, (1, 64), 3


def main() -> None:
    """Prints tokens a second, prompts included."""
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
        print(f"batch {batch}: {median:.3f} s, {batch * _TOKENS / median:,.0f} tokens/s")


if __name__ == "__main__":
    main()
