"""A model of `transformers` whose layers attend initial tokens, separators and a window.

It needs nothing but torch and transformers. The weights, and all but the mask, are those of the
family; `seqeff` in config.json says what the tokens of each layer attend:

  window: nearest tokens, itself included; null: all before it.
  initial_tokens: first tokens of the text.
  separator_ids, interval: separators are the tokens of these ids, and every so many of the text.
  separators: how many of the latest separators that have left the window; null: all.
  positions: absolute, or compact: what is attended beyond the window is turned to the positions
    right before it, in its order.

Source: SepLLM (arXiv 2412.12094), sections 3.1 and 3.3. The keys and values of all tokens stay in
the cache, and a mask says which are attended: the tokens are exactly those of training, the speed
is that of dense attention, or somewhat less where positions are compact.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, GPTNeoXConfig, GPTNeoXForCausalLM

_COMPACT = "separator_compact"


class Turns(NamedTuple):
    """By how many positions queries and keys are turned to see what is beyond the window.

    There are two lists of it, the initial tokens and the separators, or one of both. The first
    dimensions of all are batch and methods.
    """

    queries: torch.Tensor  # [..., lists, rows]
    keys: torch.Tensor  # [..., length], each for its own list
    lists: torch.Tensor  # [..., lists, length], whether a token is in it


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
            own = functools.partial(self._own, self._methods.index(method))
            module.register_forward_pre_hook(own, with_kwargs=True)
            if _is_compact(method):
                module.config = copy.copy(module.config)
                module.config._attn_implementation = _COMPACT
        self._compact = any(map(_is_compact, self._methods))

    @functools.wraps(GPTNeoXForCausalLM.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        turns: Turns | None = None,
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
                    "give attention_mask = model.masks(ids, rows=new tokens), position_ids and, "
                    "where positions are compact, turns = model.turns(ids, rows=new tokens)"
                )
            places = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            places = (places.cumsum(-1) - 1).clamp(min=0)
            if position_ids is None:
                position_ids = places
            elif attention_mask is None and not (position_ids == places).all():
                raise ValueError("texts in one row are not kept apart: give each a row of its own")
            turns = self.turns(input_ids, attention_mask)
            attention_mask = self.masks(input_ids, attention_mask)
        if self._compact:
            if turns is None:
                raise ValueError("positions are compact: give turns = model.turns(ids) too")
            others["turns"] = turns
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
        inputs["turns"] = self.turns(input_ids, attention_mask, rows=rows)
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

        Where positions are compact, what is beyond the window follows, in as many columns again.

        Args:
          ids: of all tokens so far, [batch, length].
          attention_mask: 0 for padding, [batch, length].
          rows: of the latest tokens; None: all.
        """
        place, real = _places(ids, attention_mask)
        token = torch.arange(ids.shape[1], device=ids.device)
        row = token[-(rows or len(token)) :, None]
        # padding attends itself, lest it attend nothing
        before = ((token <= row) & real[:, None]) | (token == row)
        allowed = []
        for method in self._methods:
            window = method["window"]
            near = before if window is None else before & (row - token < window)
            far = before & _far(method, ids, place, row) if "separator_ids" in method else None
            if _is_compact(method):
                parts = [near, far & ~near]
            else:
                parts = [near if far is None else near | far]
                parts += [torch.zeros_like(near)] * self._compact
            allowed.append(torch.cat(parts, -1))
        allowed = torch.stack(allowed, dim=1)
        masks = torch.zeros(allowed.shape, dtype=self.dtype, device=ids.device)
        return masks.masked_fill(~allowed, torch.finfo(self.dtype).min)

    def turns(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rows: int | None = None,
    ) -> Turns | None:
        """What compact positions need beside `masks`, of the same arguments; None without them."""
        if not self._compact:
            return None
        place, _ = _places(ids, attention_mask)
        rows = rows or ids.shape[1]
        found = [_turns(method, ids, place, rows) for method in self._methods]
        return Turns(*(torch.stack(part, dim=1) for part in zip(*found, strict=True)))

    def _own(self, method: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gives an attention the mask of its layer, and its turns."""
        mask, turns = kwargs["attention_mask"][:, method : method + 1], kwargs.pop("turns", None)
        if _is_compact(self._methods[method]):
            rotary = next(x for x in self.modules() if hasattr(x, "inv_freq"))
            kwargs["turns"] = Turns(*(part[:, method] for part in turns))
            kwargs["frequencies"] = rotary.inv_freq
        elif self._compact:
            mask = mask[..., : mask.shape[-1] // 2]
        kwargs["attention_mask"] = mask
        return args, kwargs


def _is_compact(method: dict[str, Any]) -> bool:
    return method.get("positions") == "compact"


def _places(
    ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens' places in their text, padding on the left not counted, and which are none."""
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, the ids are {list(ids.shape)}: "
            "give both of all tokens so far"
        )
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    real = real.to(ids.device, torch.bool)
    token = torch.arange(ids.shape[1], device=ids.device)
    return token - real.int().argmax(-1, keepdim=True), real


def _lists(
    method: dict[str, Any], ids: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are initial, and which other ones are separators; [batch, length]."""
    initial = (place >= 0) & (place < method["initial_tokens"])
    kept = torch.isin(ids, torch.tensor(method["separator_ids"], dtype=ids.dtype).to(ids.device))
    if method["interval"] is not None:
        kept = kept | (place % method["interval"] == 0)
    return initial, kept & (place >= 0) & ~initial


def _through(listed: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """How many of a list are at or before tokens, [batch, len(last)]; 0 before the first."""
    count = listed.cumsum(-1)
    return torch.where(last >= 0, count[:, last.clamp(min=0)], 0)


def _far(
    method: dict[str, Any], ids: torch.Tensor, place: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """The initial tokens, and the separators that rows attend; [batch, 1 or rows, length]."""
    initial, kept = _lists(method, ids, place)
    if method["separators"] is None:
        return (initial | kept)[:, None]
    have_left = _through(kept, row[:, 0] - method["window"])
    latest = kept.cumsum(-1)[:, None] > have_left[..., None] - method["separators"]
    return initial[:, None] | (kept[:, None] & latest)


def _turns(
    method: dict[str, Any], ids: torch.Tensor, place: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The turns of a method; those of one that is not compact are never used."""
    if not _is_compact(method):
        unused = torch.zeros_like(place)
        lists = torch.stack([unused, unused], dim=1)
        return lists[..., -rows:], unused, lists.bool()
    initial, kept = _lists(method, ids, place)
    if method["separators"] is None:
        initial, kept = torch.zeros_like(initial), initial | kept
    last = torch.arange(ids.shape[1], device=ids.device)[-rows:] - method["window"]
    own = place[:, -rows:]
    # entries between a list's last visible one and the query
    between = (own + 1).clamp(max=method["window"]) - 1
    end = _through(kept, last)
    separators = end + between - own
    most = method["separators"]
    between = between + (end if most is None else end.clamp(max=most))
    queries = torch.stack([_through(initial, last) + between - own, separators], dim=1)
    rank = torch.where(initial, initial.cumsum(-1), kept.cumsum(-1)) - 1
    return queries, rank - place, torch.stack([initial, kept], dim=1)


def _turned(x: torch.Tensor, by: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Heads, [batch, heads, tokens, head_dim], rotated by so many positions more."""
    angles = by[:, None, :, None] * frequencies.to(x.device, torch.float32)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = cosine.shape[-1]
    first, second, others = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(
        [first * cosine - second * sine, second * cosine + first * sine, others], dim=-1
    )


def _attend_compactly(
    module: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    turns: Turns,
    frequencies: torch.Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One softmax over the window and the lists.

    An entry is there twice, for the window and beyond it. Queries for the window and for each list
    lie side by side, and an entry is 0 but for those that see it.
    """
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    turned = _turned(keys, turns.keys, frequencies)
    listed = [turned * own[:, None, :, None] for own in turns.lists.unbind(1)]
    nothing = torch.zeros_like(keys)
    seen = [_turned(queries, by, frequencies) for by in turns.queries.unbind(1)]
    near = torch.cat([keys, *(nothing for _ in listed)], dim=-1)
    far = torch.cat([nothing, *listed], dim=-1)
    output = torch.nn.functional.scaled_dot_product_attention(
        torch.cat([queries, *seen], dim=-1),
        torch.cat([near, far], dim=2),
        torch.cat([values, values], dim=2),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_COMPACT, _attend_compactly)
