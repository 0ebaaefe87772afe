"""A plain server around transformers, as people write it: FastAPI, `generate` in a thread, one request at a time.

    python bench/peers/server_transformers.py MODEL FORM PORT THREADS

POST /v1/completions takes prompt, max_tokens, temperature and stream; a stream has an event for each token.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tokens(BaseStreamer):
    """Puts each token that generate() makes into a queue, then None; the prompt, which comes first, is left out."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.queue.put(int(value))
        self.prompt = False

    def end(self) -> None:
        self.queue.put(None)


def application(path: str, form: str) -> FastAPI:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = GPT2LMHeadModel.from_pretrained(path, dtype=DTYPES[form], attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    lock, app = threading.Lock(), FastAPI()

    def generate(request: dict[str, Any], streamer: Tokens | None = None) -> tuple[int, list[int]]:
        ids = tokenizer(request["prompt"], return_tensors="pt")
        drawn = {"do_sample": False} if request["temperature"] == 0 else {"do_sample": True, "temperature": request["temperature"]}
        with lock, torch.inference_mode():
            made = model.generate(**ids, max_new_tokens=request["max_tokens"], streamer=streamer, **drawn)
        count = ids["input_ids"].shape[1]
        return count, made[0, count:].tolist()

    def events(request: dict[str, Any]) -> Iterator[str]:
        streamer = Tokens()
        thread = threading.Thread(target=generate, args=(request, streamer))
        thread.start()
        while (token := streamer.queue.get()) is not None:
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': tokenizer.decode([token])}]})}\n\n"
        thread.join()
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    def completions(request: dict[str, Any]) -> Any:
        if request.get("stream"):
            return StreamingResponse(events(request), media_type="text/event-stream")
        prompt, made = generate(request)
        usage = {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)}
        return {"choices": [{"index": 0, "text": tokenizer.decode(made), "finish_reason": "length"}], "usage": usage}

    return app


if __name__ == "__main__":
    path, form, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    uvicorn.run(application(path, form), port=int(port), log_level="warning")
