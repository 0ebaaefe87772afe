"""POST /v1/chat/completions: a conversation written down by a template, and the assistant's next turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptfast.errors import Error
from gptfast.generation.engine import Completion
from gptfast.generation.prompt_score import PromptScore
from gptfast.serving.calls import Call, Served, bounded, encode_prompt, sampling, tops_of
from gptfast.serving.errors import ApiError
from gptfast.serving.logprobs import chat_content
from gptfast.serving.schemas import ChatRequest, Message, read
from gptfast.tasks import dialogue


def written(served: Served, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
    """The ids of a conversation. Raises ApiError 400."""
    try:
        text = dialogue.render([message.plain() for message in messages], served.template, generation_prompt)
    except Error as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from None
    return encode_prompt(served, text, "messages")


class ChatCall(Call):
    """White space before an answer's first word belongs to the template and is left out."""

    kind = "chatcmpl"

    def __init__(self, served: Served, body: bytes) -> None:
        request = read(ChatRequest, body)
        super().__init__(served, request)
        self.head["object"] = "chat.completion.chunk" if self.stream else "chat.completion"
        top = bounded("top_logprobs", request.top_logprobs, served.limits.max_logprobs)
        if top is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs is allowed with logprobs: true only", "top_logprobs", "invalid_value")
        self.logprobs = bool(request.logprobs)
        self.prompts = [written(served, request.messages)]
        most = next(m for m in (request.max_completion_tokens, request.max_tokens, served.config.n_positions) if m is not None)
        logprobs = (top or 0) if self.logprobs else None
        self.params = sampling(served, request, self.n, most, logprobs, dialogue.stop_strings(served.template))
        self._begun: set[int] = set()

    def opening(self, scores: Sequence[PromptScore]) -> bytes:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self.n)]
        return b"".join(self.event([choice]) for choice in choices)

    def chunk(self, prompt: int, piece: Completion) -> bytes:
        """A piece without text, log-probabilities and end says nothing."""
        text = piece.text if piece.index in self._begun else piece.text.lstrip()
        if text:
            self._begun.add(piece.index)
        logprobs = self._content(piece)
        ended = piece.finish_reason is not None
        if not text and logprobs is None and not ended:
            return b""
        choice: dict[str, Any] = {
            "index": piece.index, "delta": {"content": text} if text or not ended else {}, "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        return self.event([{**choice, "seed": piece.seed} if ended else choice])

    def choice(self, prompt: int, place: int, answer: Completion, scores: Sequence[PromptScore]) -> dict[str, Any]:
        """One entry of `choices`."""
        message = {"role": "assistant", "content": answer.text.lstrip(), "refusal": None}
        return {
            "index": place, "message": message, "logprobs": self._content(answer), "finish_reason": answer.finish_reason,
            "seed": answer.seed,
        }

    def _content(self, answer: Completion) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": chat_content(self.served.tokenizer, answer.token_ids, answer.logprobs, tops_of(answer)), "refusal": None}
