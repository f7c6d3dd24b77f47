"""A model of `transformers` whose layers attend initial tokens, separators and a window.

It needs nothing but torch and transformers. The weights, and all but the mask, are those of the
family; `seqeff` in config.json says what the tokens of each layer attend:

  window: nearest tokens, itself included; null: all before it.
  initial_tokens: first tokens of the text.
  separator_ids, interval: separators are the tokens of these ids, and every so many of the text.
  separators: how many of the latest separators that have left the window; null: all.

Source: SepLLM (arXiv 2412.12094), section 3.1. The keys and values of all tokens stay in the cache,
and a mask says which are attended: the tokens are exactly those of training, the speed is that of
dense attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


class SeparatorGPTNeoXConfig(GPTNeoXConfig):
    model_type = "separator_gpt_neox"


class SeparatorGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = SeparatorGPTNeoXConfig
    # their kernels take no mask of this kind
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: SeparatorGPTNeoXConfig) -> None:
        super().__init__(config)
        if not hasattr(self, "lm_head"):
            raise ImportError("the head has another name in this transformers: give a later one")
        attention, others = config.seqeff["attention"], config.seqeff["layer_attention"]
        self._methods = []
        for module in self.modules():
            layer = getattr(module, "layer_idx", None)
            if layer is None:
                continue
            method = others.get(str(layer), attention)
            if method not in self._methods:
                self._methods.append(method)
            own = functools.partial(_own_mask, self._methods.index(method))
            module.register_forward_pre_hook(own, with_kwargs=True)

    @functools.wraps(GPTNeoXForCausalLM.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation = {implementation!r} takes no mask: give 'sdpa'")
        if attention_mask is None or attention_mask.ndim == 2:
            cache = others.get("cache", others.get("past_key_values"))
            if input_ids is None or (cache is not None and cache.get_seq_length()):
                raise ValueError(
                    "separators are looked for in the ids of all tokens so far: call generate, or "
                    "give attention_mask = model.masks(ids, rows=new tokens), and position_ids"
                )
            places = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            places = (places.cumsum(-1) - 1).clamp(min=0)
            if position_ids is None:
                position_ids = places
            elif attention_mask is None and not (position_ids == places).all():
                raise ValueError("texts in one row are not kept apart: give each a row of its own")
            attention_mask = self.masks(input_ids, attention_mask)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, **others
        )
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if inputs.get("inputs_embeds") is not None or getattr(cache, "is_compileable", False):
            raise ValueError("give ids, and leave cache_implementation as it is by default")
        rows, past = inputs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()
        if past + rows != input_ids.shape[1]:
            raise ValueError("give the ids of all tokens so far, and no prefill_chunk_size")
        inputs["attention_mask"] = self.masks(input_ids, attention_mask, rows=rows)
        return inputs

    def masks(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rows: int | None = None,
    ) -> torch.Tensor:
        """What tokens attend, [batch, methods, rows, length]: 0, or next to minus infinity.

        Args:
          ids: of all tokens so far, [batch, length].
          attention_mask: 0 for padding, [batch, length].
          rows: of the latest tokens; None: all.
        """
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, the ids are {list(ids.shape)}: "
                "give both of all tokens so far"
            )
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        real = real.to(ids.device, torch.bool)
        token = torch.arange(ids.shape[1], device=ids.device)
        # padding on the left is not counted
        place = token - real.int().argmax(-1, keepdim=True)
        row = token[-(rows or len(token)) :, None]
        # padding attends itself, lest it attend nothing
        before = ((token <= row) & real[:, None]) | (token == row)
        allowed = []
        for method in self._methods:
            window = method["window"]
            near = before if window is None else before & (row - token < window)
            far = _far(method, ids, place, row) if "separator_ids" in method else False
            allowed.append(near | (before & far))
        allowed = torch.stack(allowed, dim=1)
        masks = torch.zeros(allowed.shape, dtype=self.dtype, device=ids.device)
        return masks.masked_fill(~allowed, torch.finfo(self.dtype).min)


def _far(
    method: dict[str, Any], ids: torch.Tensor, place: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """The initial tokens, and the separators that rows attend; [batch, 1 or rows, length]."""
    initial = (place >= 0) & (place < method["initial_tokens"])
    kept = torch.isin(ids, torch.tensor(method["separator_ids"], dtype=ids.dtype).to(ids.device))
    if method["interval"] is not None:
        kept = kept | (place % method["interval"] == 0)
    kept = kept & (place >= 0)
    if method["separators"] is None:
        return (initial | kept)[:, None]
    others = kept & ~initial
    count = others.cumsum(-1)
    left = row[:, 0] - method["window"]
    have_left = torch.where(left >= 0, count[:, left.clamp(min=0)], 0)
    latest = count[:, None] > have_left[..., None] - method["separators"]
    return initial[:, None] | (others[:, None] & latest)


def _own_mask(method: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Gives an attention the mask of its layer."""
    kwargs["attention_mask"] = kwargs["attention_mask"][:, method : method + 1]
    return args, kwargs
