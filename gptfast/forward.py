"""One forward pass as its caller sees it: what goes in, checked and laid out for the blocks, and what comes out.

Padding takes no part in anything. Without a cache it gets the document id -1, which attention leaves out. With a cache the real
tokens of each row are moved to the front before the pass and their results moved back after it, so that padding, left or right,
never stands between two tokens of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gptfast.cache import KVCache, compaction, gather_tokens
from gptfast.config import GPT2Config
from gptfast.errors import Error


@dataclass
class ModelOutput:
    """What a model returns: attributes, and indexing, slicing and iteration over those that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the attributes."""
        return tuple(value for field in fields(self) if (value := getattr(self, field.name)) is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())


@dataclass
class Pass:
    """One forward pass over B rows of T tokens, as the blocks compute it."""

    ids: Tensor | None  # [B, T]
    embeds: Tensor | None  # [B, T, C], in place of ids
    positions: Tensor  # [B, T]
    document_ids: Tensor | None = None  # [B, T], -1 for padding
    seeds: Tensor | None = None  # [1 + 3 n_layer] int64, one for each dropout; None where nothing is dropped
    cache: KVCache | None = None
    fresh: bool = True  # no row of the cache holds a token yet
    ends: Tensor | None = None  # [B] int32: each row's length in the cache after this pass, padding counted
    counts: Tensor | int = 0  # real tokens of each row
    restore: Tensor | None = None  # [B, T]: where the results of the caller's tokens are, if tokens were moved

    def seed(self, site: int) -> Tensor | None:
        """The seed [1] of one dropout: 0 behind the embeddings, then three a block."""
        return None if self.seeds is None else self.seeds[site : site + 1]

    def finish(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Counts the tokens that the cache now holds and brings states [B, T, C] back into the caller's layout."""
        if self.cache is not None:
            self.cache.lengths.add_(self.counts)
        return states if self.restore is None else tuple(gather_tokens(state, self.restore) for state in states)


def prepare(
    config: GPT2Config,
    dtype: torch.dtype,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    use_cache: bool,
    document_ids: Tensor | None,
) -> Pass:
    """The pass for what GPT2LMHeadModel.forward documents. Raises gptfast.Error for ids, shapes and lengths that do not fit."""
    given = _check_given(input_ids, inputs_embeds, config)
    B, T = given.shape[:2]
    mask = _check_mask(attention_mask, B, T, past_key_values is not None)
    cache = _open_cache(config, dtype, past_key_values, attention_mask, given, use_cache)
    if mask is not None and inputs_embeds is not None:  # what stands at padding must not reach a product: 0 * NaN is NaN
        inputs_embeds = inputs_embeds.masked_fill(~mask[..., None], 0)
    if position_ids is not None:
        position_ids = position_ids.expand(B, T)
    if cache is None:
        now = _plain(input_ids, inputs_embeds, mask, document_ids, given)
    elif document_ids is not None:
        raise Error("document_ids and past_key_values exclude each other: a cached row is one document")
    else:
        now, position_ids = _cached(input_ids, inputs_embeds, mask, position_ids, cache, given)
    before = 0 if cache is None else cache.lengths
    now.counts = T if mask is None else mask.sum(1, dtype=torch.int32)
    longest = int(torch.as_tensor(before + now.counts).max()) if B else 0
    if longest > config.n_positions:
        raise Error(f"the sequence has {longest:,} tokens, the model's context is {config.n_positions:,}")
    if position_ids is not None:
        check_ids("position_ids", position_ids, config.n_positions)
        now.positions = position_ids
    if cache is not None:
        now.positions = now.positions.clamp(max=config.n_positions - 1)  # padding behind a full row
        cache.reserve(T)
    return now


def _plain(ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, document_ids: Tensor | None, given: Tensor) -> Pass:
    B, T = given.shape[:2]
    if mask is None:
        return Pass(ids, embeds, torch.arange(T, device=given.device).expand(B, T), document_ids)
    documents = torch.zeros(B, T, dtype=torch.int64, device=given.device) if document_ids is None else document_ids
    return Pass(ids, embeds, (mask.cumsum(1) - 1).clamp(min=0), documents.masked_fill(~mask, -1))


def _cached(
    ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, position_ids: Tensor | None, cache: KVCache, given: Tensor
) -> tuple[Pass, Tensor | None]:
    T = given.shape[1]
    steps = torch.arange(T, device=given.device)
    now = Pass(ids, embeds, cache.lengths[:, None] + steps, cache=cache, fresh=cache.get_seq_length() == 0, ends=cache.lengths + T)
    if mask is None:
        return now, position_ids
    counts, order = compaction(mask)
    now.ids, now.embeds, position_ids = (None if t is None else gather_tokens(t, order) for t in (ids, embeds, position_ids))
    now.restore = torch.argsort(order, dim=1)
    now.document_ids = torch.where(steps < counts[:, None], 0, -1)  # read only where the cache is fresh
    return now, position_ids


def _open_cache(
    config: GPT2Config, dtype: torch.dtype, past: Any, mask: Tensor | None, given: Tensor, use_cache: bool
) -> KVCache | None:
    if past is None:
        stored = torch.float32 if config.reorder_and_upcast_attn else dtype
        return KVCache(config, given.shape[0], dtype=stored, device=given.device) if use_cache else None
    if isinstance(past, (tuple, list)):
        length = past[0][0].shape[2]
        both = mask is not None and mask.shape[1] == length + given.shape[1]
        past = KVCache.from_legacy(config, past, mask[:, :length] if mask is not None and both else None)
    if not isinstance(past, KVCache):
        raise Error(f"past_key_values is a {type(past).__name__}; what an earlier call returned, or ((k, v), ...), is needed")
    if past.batch != given.shape[0]:
        raise Error(f"past_key_values has {past.batch} rows, the input has {given.shape[0]}")
    return past


def _check_mask(mask: Tensor | None, batch: int, length: int, cached: bool) -> Tensor | None:
    """Which of these tokens are real [B, T] bool, or None where all are. With a cache the mask may begin with the cached tokens."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length or (mask.shape[1] > length and not cached):
        raise Error(f"attention_mask has shape {tuple(mask.shape)}, the input needs {(batch, length)}")
    real = mask[:, mask.shape[1] - length :] != 0
    return None if bool(real.all()) else real


def _check_given(ids: Tensor | None, embeds: Tensor | None, config: GPT2Config) -> Tensor:
    if ids is not None and embeds is None:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise Error(f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; whole numbers of shape [batch, tokens] are needed")
        check_ids("input_ids", ids, config.real_vocabulary)
        return ids
    if embeds is None or ids is not None:
        raise Error("a model needs either input_ids or inputs_embeds")
    if embeds.dim() != 3 or embeds.shape[2] != config.n_embd:
        raise Error(f"inputs_embeds have shape {tuple(embeds.shape)}; [batch, tokens, {config.n_embd}] is needed")
    return embeds


def check_ids(name: str, ids: Tensor, limit: int, ignore: bool = False) -> None:
    """Raises gptfast.Error that names the first id outside 0..limit-1; with `ignore` -100 is allowed."""
    bad = (ids < 0) | (ids >= limit)
    if ignore:
        bad &= ids != -100
    if bool(bad.any()):
        raise Error(f"{name} hold {int(ids[bad][0])}; allowed: 0 to {limit - 1:,}" + (" and -100" if ignore else ""))
