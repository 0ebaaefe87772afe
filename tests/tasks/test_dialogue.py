"""Dialogue: the templates, the loss on the assistant's turns alone, what is learned, and chat."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import Error, LoadError, tasks
from gptfast.config import TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks import dialogue
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.task import IGNORED
from gptfast.tokenizer import GPT2Tokenizer

HELLO = [
    {"role": "system", "content": "be kind"}, {"role": "user", "content": " hi \n"},
    {"role": "assistant", "content": "hello\nyou"}, {"role": "user", "content": "bye"},
]  # fmt: skip
ANSWERS = {"film": "a story to watch", "book": "a story to read", "song": "a story to hear", "joke": "a story to tell"}


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.train(["User: hi\nAssistant: hello you\n### System\n\nbe kind ? ! ' 's 12 é\n\n" * 9], 320)


def test_templates_as_text() -> None:
    text = "System: be kind\nUser: hi\nAssistant: hello\nyou\nUser: bye\n"
    assert dialogue.render(HELLO, "plain", generation_prompt=False) == text
    assert dialogue.render(HELLO, dialogue.TEMPLATES["plain"]) == text + "Assistant:"
    marked = dialogue.render(HELLO[1:], "markdown")
    assert marked == "### User\nhi\n\n### Assistant\nhello\nyou\n\n### User\nbye\n\n### Assistant\n"
    assert "\nUser:" in dialogue.stop_strings("plain") and "\n\n### User" in dialogue.stop_strings("markdown")
    with pytest.raises(Error, match="template is 'chatml'; allowed: plain, markdown"):
        dialogue.render(HELLO, "chatml")


turns = st.lists(
    st.fixed_dictionaries({
        "role": st.sampled_from(dialogue.ROLES),
        "content": st.text("ab1.,:!?'s\n #-é\u00a0\t\u2003", min_size=1, max_size=14).filter(lambda text: bool(text.strip())),
    }),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(messages=turns, name=st.sampled_from(sorted(dialogue.TEMPLATES)))
def test_training_sees_the_tokens_that_chat_and_the_server_send(
    tokenizer: GPT2Tokenizer, messages: list[dict[str, str]], name: str
) -> None:
    """The ids of a conversation in training are those of its text as a whole, and an answer's place is where its prompt ends."""
    if not any(message["role"] == "assistant" for message in messages):
        messages = [*messages, {"role": "assistant", "content": "a"}]
    ids, targets = dialogue.Dialogue(template=name).encode(dialogue.Conversation(messages=messages), tokenizer, 10_000)
    assert ids == tokenizer.encode(dialogue.render(messages, name, generation_prompt=False))
    expected = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.encode(dialogue._text(messages[:number], dialogue.TEMPLATES[name], True)))
            lead = " " if name == "plain" else ""
            answer = [*tokenizer.encode(lead + message["content"].strip()), tokenizer.eos_token_id]
            expected[start - 1 : start - 1 + len(answer)] = answer
    assert targets == expected


def test_a_conversation_that_is_too_long(tokenizer: GPT2Tokenizer) -> None:
    task, example = dialogue.Dialogue(), dialogue.Conversation(messages=HELLO)
    whole = task.encode(example, tokenizer, 999)
    first = next(place for place, target in enumerate(whole.targets) if target != IGNORED)
    assert task.encode(example, tokenizer, first + 1) == (whole.ids[: first + 1], whole.targets[: first + 1])
    with pytest.raises(Error, match=f"no answer within the first {first:,} tokens"):
        task.encode(example, tokenizer, first)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', "messages are []"),
        ('{"text": "x"}', "messages are None"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the assistant says nothing"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1 has the role 'robot'; allowed: system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": " "}]}', "message 2 has the content ' '"),
        ('{"messages": ["x"]}', "message 1 is 'x'"),
    ],
)
def test_lines_that_are_no_conversation(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": HELLO}) + f"\n{line}\n")
    with pytest.raises(LoadError) as caught:
        dialogue.Dialogue().read(path)
    assert f"{path}, line 2: " in str(caught.value) and message in str(caught.value)


def conversations(path: Path, count: int) -> Path:
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        for noun in draw.sample(sorted(ANSWERS), 2):
            messages += [{"role": "user", "content": f"the {noun} is"}, {"role": "assistant", "content": ANSWERS[noun]}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


def test_perplexity_is_that_of_the_answers_alone(base: Path, tmp_path: Path) -> None:
    examples = dialogue.Dialogue().read(conversations(tmp_path / "a.jsonl", 3))
    model, tokenizer = GPT2LMHeadModel.from_pretrained(base), GPT2Tokenizer.from_pretrained(base)
    found = dialogue.Dialogue().measure(model, tokenizer, examples.items)
    total, count = 0.0, 0
    for example in examples:
        for number in (1, 3):
            prompt = tokenizer.encode(dialogue.render(example.messages[:number], "plain"))
            answer = [*tokenizer.encode(" " + example.messages[number]["content"]), tokenizer.eos_token_id]
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].double(), -1)
            total -= sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
            count += len(answer)
    assert found["tokens"] == count and found["conversations"] == 3
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogue")
    data = conversations(folder / "a.jsonl", 160)
    config = TrainConfig(str(data), str(folder / "run"), str(base), lr=1e-2, batch=8, weight_decay=0.0, save_every=0)
    result = finetune("dialogue", config, FinetuneConfig(epochs=5, val=0.0), quiet=True)
    assert result["task"] == "dialogue" and result["loss"] < 0.1
    return folder / "run"


def test_what_was_learned_is_answered(tuned: Path, run: Any, tmp_path: Path) -> None:
    assert dialogue.recorded(tuned) == "plain" and tasks.recorded(tuned) == dialogue.Dialogue()
    code, out, _ = run("predict", tuned, "the film is", "the joke is")
    assert code == 0 and out.splitlines() == [ANSWERS["film"], ANSWERS["joke"]]
    code, out, _ = run("evaluate", tuned, "--data", conversations(tmp_path / "b.jsonl", 20), "--json")
    assert code == 0 and json.loads(out)["perplexity"] < 1.5
    code, out, _ = run("evaluate", tuned, "--data", tmp_path / "b.jsonl", "--json", "--template", "markdown")
    assert code == 0 and json.loads(out)["perplexity"] > 1.5, "another template is another language"


def test_chat_speaks_the_recorded_template(tuned: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = b"the film is\n\nthe song is\n/text\n/reset\nthe joke is\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    code, out, err = run("chat", tuned, "--temperature", "0", "--seed", "1")
    assert code == 0 and "fine-tuned for dialogue" in err and "base model" not in err
    text = f"User: the film is\nAssistant: {ANSWERS['film']}\nUser: the song is\nAssistant: {ANSWERS['song']}\n"
    assert out == f"{ANSWERS['film']}\n{ANSWERS['song']}\n{text}\n{ANSWERS['joke']}\n"
