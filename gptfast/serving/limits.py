"""What one request, one key and all of them together may take: nothing that a client sends is without a bound."""

from __future__ import annotations

from dataclasses import dataclass

from gptfast.config import option


@dataclass(frozen=True)
class Limits:
    """Bounds of the server; each is an option of `gptfast serve`. What is beyond one is refused by name before anything is made."""

    max_body: int = option(4 << 20, "largest request body in bytes (beyond: 413)", low=1024, high=1 << 30)
    max_header: int = option(32 << 10, "largest request header in bytes (beyond: 431)", low=1024, high=1 << 20)
    max_prompts: int = option(256, "most prompts in a request", low=1, high=1 << 16)
    max_prompt_tokens: int = option(1 << 18, "most tokens of a request's prompts together", low=1, high=1 << 30)
    max_n: int = option(16, "largest n and best_of", low=1, high=4096)
    max_answers: int = option(512, "most answers of a request: prompts times best_of", low=1, high=1 << 16)
    max_logprobs: int = option(20, "largest logprobs and top_logprobs", low=0, high=1000)
    max_logit_bias: int = option(1024, "most entries of logit_bias", low=0, high=1 << 20)
    max_stop: int = option(64, "most stop strings", low=0, high=1024)
    max_stop_bytes: int = option(256, "longest stop string in bytes", low=1, high=1 << 16)
    max_queue: int = option(1024, "most answers waiting or being made; a request beyond them gets 429", low=1, high=1 << 20)
    max_per_key: int = option(256, "most requests of one API key at once; one beyond them gets 429", low=1, high=1 << 20)
    deadline: float = option(600.0, "longest time for one request in seconds (beyond: 504)", low=0.01, high=1e6)
    read_timeout: float = option(30.0, "longest time for a request to arrive in seconds (beyond: 408)", low=0.01, high=1e6)
    send_timeout: float = option(30.0, "longest time that a client may take no data, in seconds", low=0.01, high=1e6)
    drain: float = option(30.0, "after SIGTERM running requests have so many seconds before they are cancelled", low=0.0, high=1e6)
