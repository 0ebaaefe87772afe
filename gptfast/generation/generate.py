"""`model.generate` with Hugging Face's argument names and defaults, over gptfast's loop and beam search.

Values come from the call, then from generation_config.json, then from the defaults below. A name that is not supported is an error,
never ignored, unless its value is the one that does nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.errors import Error
from gptfast.generation.beam import BeamSettings, Hypothesis, ModelBeams, beam_search
from gptfast.generation.loop import check_prompt, decode, evaluating
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.rows import Row, int64
from gptfast.generation.stream import TextStream

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None, "max_length": None, "min_new_tokens": None, "min_length": 0, "do_sample": False, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1, "length_penalty": 1.0,
    "early_stopping": False, "num_return_sequences": 1, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None,
    "bad_words_ids": None, "suppress_tokens": None, "stop_strings": None, "return_dict_in_generate": False, "output_scores": False,
}
# what Hugging Face has and gptfast has not: only the values under which it does nothing are accepted
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,), "cache_implementation": (), "cache_config": (), "return_legacy_cache": (True, False), "max_time": (),
    "penalty_alpha": (0.0,), "dola_layers": (), "diversity_penalty": (0.0,), "num_beam_groups": (1,), "low_memory": (False,),
    "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (), "constraints": (), "force_words_ids": (), "sequence_bias": (),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "remove_invalid_values": (False,), "guidance_scale": (1.0,),
    "exponential_decay_length_penalty": (), "begin_suppress_tokens": (), "renormalize_logits": (False,), "watermarking_config": (),
    "token_healing": (False,), "output_attentions": (False,), "output_hidden_states": (False,), "output_logits": (False,),
    "decoder_start_token_id": (), "prompt_lookup_num_tokens": (), "assistant_early_exit": (), "disable_compile": (True, False),
    "logits_processor": ([],), "stopping_criteria": ([],), "prefix_allowed_tokens_fn": (), "assistant_model": (), "streamer": (),
    "synced_gpus": (False,), "negative_prompt_ids": (), "custom_generate": (), "past_key_values": (), "position_ids": (),
}
# of the speculation that generation_config.json may describe, and of the file itself: they never change what is generated
DESCRIPTIVE = (
    "transformers_version", "_from_model_config", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_lookbehind",
    "assistant_confidence_threshold", "target_lookbehind", "max_matching_ngram_size", "is_assistant", "compile_config",
)


@dataclass
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns, for B prompts and n = num_return_sequences.

    sequences [B n, T + new] int64, the prompts first, padded on the right; logprobs [B n, new] fp32 of the chosen tokens (model's
    log-softmax; 0 behind the end; None for beams); top_logprobs: per row and token {id: logprob} with `logprobs=`; finish_reasons
    "stop", "length" or "error"; seeds that reproduce the rows; sequences_scores [B n] of beams.
    """

    sequences: Tensor
    finish_reasons: list[str]
    logprobs: Tensor | None = None
    top_logprobs: list[list[dict[int, float]]] | None = None
    seeds: list[int] | None = None
    sequences_scores: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Names of the values that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


def fresh_seeds(count: int) -> list[int]:
    """Random int64 seeds from torch's CPU generator, so that torch.manual_seed makes a program repeatable."""
    return [int(seed) for seed in torch.randint(-(2**63), 2**63 - 1, (count,))]


def _resolve(model: GPT2LMHeadModel, generation_config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    stored = model.generation_config if generation_config is None else generation_config
    if not isinstance(stored, Mapping):
        if not hasattr(stored, "to_dict"):
            raise Error(f"generation_config is a {type(stored).__name__}; a mapping of names and values is needed")
        stored = stored.to_dict()
    settings = dict(DEFAULTS)
    for source, where in ((stored, "generation_config: "), (given, "generate: ")):
        for name, value in source.items():
            if name in DEFAULTS:
                settings[name] = settings[name] if value is None else value
            elif name in DESCRIPTIVE:
                continue
            elif name not in NEUTRAL:
                raise Error(f"{where}argument {name} is not supported")
            elif value is not None and value not in NEUTRAL[name]:
                raise Error(f"{where}argument {name}={value!r} is not supported")
    if settings["output_scores"] and settings["num_beams"] == 1:
        raise Error("generate: output_scores=True is supported with num_beams > 1; without beams logprobs= gives log-probabilities")
    if "max_length" in given and given["max_length"] is not None and given.get("max_new_tokens") is None:
        settings["max_new_tokens"] = None  # the call's length counts more than the file's
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[name] = getattr(model.config, name) if settings[name] is None else settings[name]
    return settings


def _whole(settings: Mapping[str, Any], name: str, low: int) -> int:
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise Error(f"{name} is {value!r}; allowed: a whole number of at least {low}")
    return value


def _ids(name: str, value: Any) -> list[int]:
    if isinstance(value, Tensor):
        value = value.tolist()
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if any(not isinstance(v, int) or isinstance(v, bool) for v in values):
        raise Error(f"{name} is {value!r}; allowed: a token id or a list of them")
    return values


def _new_tokens(settings: Mapping[str, Any], width: int) -> int:
    if settings["max_new_tokens"] is not None:
        return _whole(settings, "max_new_tokens", 1)
    if settings["max_length"] is None:
        return 20
    if _whole(settings, "max_length", 1) <= width:
        raise Error(f"max_length is {settings['max_length']}, the prompt alone has {width} tokens; give more, or max_new_tokens")
    return int(settings["max_length"]) - width


def _prompts(ids: Tensor, mask: Tensor | None, settings: Mapping[str, Any], ends: Sequence[int], vocab: int) -> list[list[int]]:
    """The real tokens of each row. Without a mask, ids equal to a pad id that is no end are padding, as in transformers."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise Error(f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; whole numbers of shape [batch, tokens] are needed")
    pad = settings["pad_token_id"]
    if mask is None:
        mask = ids != pad if pad is not None and pad not in ends else torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise Error(f"attention_mask has shape {tuple(mask.shape)}, input_ids have {tuple(ids.shape)}")
    prompts = [row[keep].tolist() for row, keep in zip(ids.cpu(), (mask != 0).cpu(), strict=True)]
    for prompt in prompts:
        wrong = [token for token in prompt if not 0 <= token < vocab]
        if wrong:
            raise Error(f"input_ids hold {wrong[0]}; allowed: 0 to {vocab - 1}")
    return prompts


def _params(settings: Mapping[str, Any], new: int, width: int, logprobs: int | None, vocab: int) -> SamplingParams:
    sample, beams = settings["do_sample"], settings["num_beams"]
    if not isinstance(sample, bool):
        raise Error(f"do_sample is {sample!r}; allowed: True or False")
    if sample and settings["temperature"] == 0:
        raise Error("temperature is 0 with do_sample=True; use do_sample=False for greedy decoding")
    if sample and beams > 1:
        raise Error(f"do_sample=True with num_beams={beams} is not supported; use one of them")
    given = settings["min_new_tokens"] is not None
    least = _whole(settings, "min_new_tokens", 0) if given else _whole(settings, "min_length", 0) - width
    singles = [word[0] for word in _bad_words(settings) if len(word) == 1]
    filters = {name: settings[name] for name in ("top_k", "top_p", "min_p", "typical_p")} if sample else {"top_k": 0}
    params = SamplingParams(
        temperature=settings["temperature"] if sample else 0.0, **filters, repetition_penalty=settings["repetition_penalty"],
        banned_tokens=(*singles, *_ids("suppress_tokens", settings["suppress_tokens"] or [])), max_tokens=new,
        min_tokens=max(least, 0), stop=settings["stop_strings"] or (), logprobs=logprobs, order="hf",
    )
    params.check_vocabulary(vocab)
    return params


def _bad_words(settings: Mapping[str, Any]) -> list[list[int]]:
    words = settings["bad_words_ids"] or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise Error(f"bad_words_ids is {words!r}; allowed: a list of lists of token ids")
    return [_ids("bad_words_ids", word) for word in words]


def generate(
    model: GPT2LMHeadModel,
    input_ids: Tensor | None = None,
    *,
    generation_config: Any = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    logprobs: int | None = None,
    **arguments: Any,
) -> Tensor | GenerateOutput:
    """Continues prompts; Hugging Face's names and defaults (greedy, 20 new tokens; generation_config.json is honoured).

    input_ids [B, T] int64, padding on either side told by attention_mask [B, T] or the pad id; an empty prompt starts from
    bos_token_id; or inputs_embeds [B, T, C], of which only the new ids are returned. Returns ids [B n, T + new], padded on the
    right with pad_token_id after an end, or GenerateOutput with return_dict_in_generate=True.
    Beyond Hugging Face: `seed` (one for all rows: equal prompts get equal answers, num_return_sequences gives different ones;
    default: a random one per row from torch's generator) and `logprobs` (how many of the largest to return with each token).
    A row ends with "length" at the model's context; generation never slides. It runs on the parameters that the model has now, in
    PyTorch: the C++ engine reads packed copies, which would be out of date after the next training step; for speed open an Engine.
    Raises gptfast.Error for a prompt longer than the
    context, for an argument that is not supported, and for a value that is not allowed, each by name.
    """
    settings = _resolve(model, generation_config, arguments)
    vocab = model.config.real_vocabulary
    beams, copies = _whole(settings, "num_beams", 1), _whole(settings, "num_return_sequences", 1)
    ends = [] if settings["eos_token_id"] is None else _ids("eos_token_id", settings["eos_token_id"])
    ids, prompts, embeds = _read(model, input_ids, attention_mask, inputs_embeds, settings, ends)
    lengths = [len(p) for p in (prompts if embeds is None else embeds)]
    for length in lengths:
        check_prompt(length, model.config.n_positions)
    new = _new_tokens(settings, ids.shape[1])
    params = _params(settings, new, ids.shape[1], logprobs, vocab)
    if params.stop and tokenizer is None:
        raise Error("stop_strings need tokenizer=, to know the tokens' bytes")
    seeds = [int64(SamplingParams(seed=seed).seed or 0)] * len(prompts) if seed is not None else fresh_seeds(len(prompts))
    words = [word for word in _bad_words(settings) if len(word) > 1]

    def row(i: int, choice: int) -> Row:
        stream = TextStream(tokenizer.token_bytes, params.stop) if params.stop else None
        limit = min(new, model.config.n_positions - lengths[i])
        return Row(prompts[i], params, seeds[i], limit, frozenset(ends), choice, lengths[i], words, stream)

    pad = settings["pad_token_id"] if settings["pad_token_id"] is not None else next((e for e in ends if 0 <= e < vocab), 0)
    if beams > 1:
        result = _beams(model, [row(i, 0) for i in range(len(prompts))], settings, beams, copies, embeds, ids, pad)
    else:
        if copies > 1 and not settings["do_sample"]:
            raise Error(f"num_return_sequences is {copies}; greedy decoding has one answer (use do_sample=True or num_beams)")
        groups = [[row(i, choice) for choice in range(copies)] for i in range(len(prompts))]
        for _ in decode(model, groups, embeds):
            pass
        result = _collect([r for group in groups for r in group], ids.repeat_interleave(copies, 0), pad)
    return result if settings["return_dict_in_generate"] else result.sequences


def _read(
    model: GPT2LMHeadModel, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, settings: Mapping[str, Any],
    ends: Sequence[int],
) -> tuple[Tensor, list[list[int]], list[Tensor] | None]:
    """The ids to return in front [B, T], the real tokens of each prompt, or its vectors."""
    if embeds is not None:
        if ids is not None:
            raise Error("generate: give input_ids or inputs_embeds, not both")
        if embeds.dim() != 3 or embeds.shape[2] != model.config.n_embd or embeds.shape[1] == 0:
            raise Error(f"inputs_embeds have shape {tuple(embeds.shape)}; [batch, tokens, {model.config.n_embd}] is needed")
        real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask != 0
        if real.shape != embeds.shape[:2] or not bool(real.any(1).all()):
            raise Error(f"attention_mask of shape {tuple(real.shape)} leaves a row of inputs_embeds {tuple(embeds.shape)} empty")
        none = torch.zeros(len(embeds), 0, dtype=torch.int64, device=embeds.device)
        return none, [[] for _ in embeds], [row[keep] for row, keep in zip(embeds, real, strict=True)]
    if ids is None:
        ids = torch.zeros(1, 0, dtype=torch.int64, device=model.device)
    prompts = _prompts(ids, mask, settings, ends, model.config.real_vocabulary)
    start = settings["bos_token_id"]
    if not all(prompts):
        if start is None or not 0 <= start < model.config.real_vocabulary:
            last = model.config.real_vocabulary - 1
            raise Error(f"an empty prompt starts from bos_token_id, which is {start!r}; allowed: 0 to {last}")
        if ids.shape[1] == 0:
            ids = torch.full((ids.shape[0], 1), start, dtype=torch.int64, device=ids.device)
    return ids.to(torch.int64), [prompt or [start] for prompt in prompts], None


def _pad(rows: Sequence[Sequence[int]], ids: Tensor, pad: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[pad] * (width - len(row))] for row in rows]
    return torch.cat((ids, torch.tensor(padded, dtype=torch.int64, device=ids.device).view(len(rows), width)), dim=1)


def _collect(rows: Sequence[Row], ids: Tensor, pad: int) -> GenerateOutput:
    width = max((len(row.tokens) for row in rows), default=0)
    logprobs = torch.tensor([[*row.logprobs, *[0.0] * (width - len(row.logprobs))] for row in rows], device=ids.device)
    for number, row in enumerate(rows):
        if row.error:
            warnings.warn(f"generate: row {number} ended with a {row.error}", RuntimeWarning, stacklevel=3)
    top = [row.top_logprobs for row in rows] if rows and rows[0].params.logprobs else None
    reasons, seeds = [row.finish_reason or "" for row in rows], [row.seed for row in rows]
    return GenerateOutput(_pad([row.tokens for row in rows], ids, pad), reasons, logprobs.view(len(rows), width), top, seeds)


def _beams(
    model: GPT2LMHeadModel, rows: list[Row], settings: Mapping[str, Any], beams: int, copies: int, embeds: list[Tensor] | None,
    ids: Tensor, pad: int,
) -> GenerateOutput:
    chosen = BeamSettings(beams, settings["length_penalty"], settings["early_stopping"])
    if copies > beams:
        raise Error(f"num_return_sequences is {copies}; allowed: 1 to num_beams, which is {beams}")
    if rows[0].params.stop:
        raise Error(f"stop_strings with num_beams={beams} are not supported; use stop ids or one beam")
    chosen.check(rows, copies)
    with evaluating(model):
        found = beam_search(ModelBeams(model, embeds), rows, chosen)
    best: list[Hypothesis] = [hypothesis for each in found for hypothesis in each[:copies]]
    sequences = _pad([h.tokens for h in best], ids.repeat_interleave(copies, 0), pad)
    scores = torch.tensor([h.score for h in best], device=ids.device)
    return GenerateOutput(sequences, [h.finish_reason for h in best], sequences_scores=scores)
