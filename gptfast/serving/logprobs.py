"""OpenAI's two forms of log-probabilities, and how a token is written as text in them.

A token that is no whole code points is written as OpenAI does, `bytes:` and a backslash, x and two digits each: no two are alike.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from gptfast.tokenizer import GPT2Tokenizer

LOWEST = -9999.0  # JSON has no -inf


def token_text(data: bytes) -> str:
    """A token's bytes as its key."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Legacy:
    """The `logprobs` objects of one answer of /v1/completions; `offset`: characters of the text that are already there."""

    def __init__(self, tokenizer: GPT2Tokenizer, offset: int = 0) -> None:
        self.tokenizer, self.offset = tokenizer, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def block(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[dict[int, float] | None] | None
    ) -> dict[str, Any]:
        """The object for the next tokens: {text_offset, token_logprobs, tokens, top_logprobs}; offsets go on from the last call.

        `tops` None: none were asked for. The chosen token is in its top_logprobs too, with the same float.
        """
        offsets, texts = [], []
        for token in ids:
            data = self.tokenizer.token_bytes(token)
            ended = self._ended(data[:1])
            offsets.append(self.offset + ended)
            texts.append(token_text(data))
            self.offset += len(self._decoder.decode(data))
        values = [None if value is None else max(value, LOWEST) for value in logprobs]
        listed = None if tops is None else [self._top(*entry) for entry in zip(texts, values, tops, strict=True)]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": listed}

    def _ended(self, first: bytes) -> int:
        """Characters that earlier bytes become only because `first` does not go on with them: it stands behind these."""
        state = self._decoder.getstate()
        with_earlier, alone = len(self._decoder.decode(first)), len(first.decode(errors="ignore"))
        self._decoder.setstate(state)
        stray = len(first) and 0x80 <= first[0] < 0xC0
        return max(with_earlier - (1 if stray else alone), 0)

    def _top(self, text: str, value: float | None, top: dict[int, float] | None) -> dict[str, float] | None:
        if value is None or top is None:
            return None
        entry: dict[str, float] = {}
        for token, logprob in top.items():
            name = token_text(self.tokenizer.token_bytes(token))
            entry[name] = max(entry.get(name, LOWEST), logprob)
        entry[text] = max(entry.get(text, LOWEST), value)
        return entry


def chat_content(
    tokenizer: GPT2Tokenizer, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[dict[int, float]]
) -> list[Any]:
    """The entries of `logprobs.content` in /v1/chat/completions."""
    entries = []
    for token, logprob, top in zip(ids, logprobs, tops, strict=True):
        listed = [_chat_token(tokenizer, *item) for item in top.items()]
        entries.append({**_chat_token(tokenizer, token, logprob), "top_logprobs": listed})
    return entries


def _chat_token(tokenizer: GPT2Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": max(logprob, LOWEST)}
