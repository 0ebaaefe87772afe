"""lm-eval against the server: three tasks without a network, scored over HTTP, by lm-eval's own `hf` model, and in process.

    python -m venv VENV && VENV/bin/pip install torch transformers 'lm_eval[api]'
    python -P tests/oracles/run_lm_eval.py MODEL --lm-eval VENV/bin/lm_eval --limit 100

MODEL is a Hugging Face folder. The tasks come from the data sets below GPTFAST_DATA: sentiment of SST-2's development set (two
continuations a text), the last word of lines of tinyshakespeare, and log P of paragraphs of WikiText-2 (rolling). The server is
asked through `local-completions` with its own tokenizer (/tokenizer_info, /tokenize, /detokenize), batches of token ids, echo and
logprobs. Every request's log P is compared with gptfast in process and with `hf`; ends with 1 where one is off by over 1e-4 nats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gptfast
from gptfast.testing.live import LiveServer

ALLOWED = 1e-4  # nats a request
TASKS = ("gptfast_sst2", "gptfast_shakespeare", "gptfast_wikitext")
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\nnum_fewshot: 0\n"
KINDS = {
    "gptfast_sst2": 'output_type: multiple_choice\ndoc_to_text: "{{text}}\\nSentiment:"\ndoc_to_target: "{{label}}"\n'
    'doc_to_choice: ["negative", "positive"]\nmetric_list:\n  - metric: acc\n',
    "gptfast_shakespeare": 'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{word}}"\n'
    "metric_list:\n  - metric: perplexity\n  - metric: acc\n",
    "gptfast_wikitext": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list:\n  - metric: bits_per_byte\n",
}


def documents(data: Path, limit: int) -> dict[str, list[dict[str, Any]]]:
    """The first `limit` documents of each task."""
    pairs = [line.rsplit("\t", 1) for line in (data / "sst2/dev.tsv").read_text(encoding="utf-8").splitlines()]
    sentiment = [{"text": text, "label": int(label)} for text, label in pairs if label in ("0", "1")]
    lines = [line for line in (data / "tinyshakespeare.txt").read_text().splitlines() if len(line.split()) > 5]
    words = [{"context": line.rpartition(" ")[0], "word": f" {line.rpartition(' ')[2]}"} for line in lines]
    paragraphs = [line.strip() for line in (data / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()]
    texts = [{"text": text} for text in paragraphs if 200 < len(text) < 3000]
    return {name: found[:limit] for name, found in zip(TASKS, (sentiment, words, texts), strict=True)}


def write_tasks(folder: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in found.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(file=file)}{KINDS[name]}")


def run(program: str, folder: Path, label: str, model: str, arguments: str, batch: int) -> dict[str, list[float]]:
    """Task -> log P of every request, in the order of documents and continuations; prints lm-eval's table."""
    out = folder / label
    command = [program, "--model", model, "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
    command += ["--batch_size", str(batch), "--log_samples", "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lm-eval with {model} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(f"{label}:\n" + "\n".join(line for line in done.stdout.splitlines() if line.startswith("|")), flush=True)
    found = {}
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[name] = [_value(response) for sample in samples for response in sample["resps"]]
    return found


def _value(response: Any) -> float:
    """log P out of [[value, is_greedy]], ["value", ...] or [value], as versions and kinds of tasks write it."""
    while isinstance(response, list):
        response = response[0]
    return float(response)


def in_process(folder: Path, found: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """The same requests by gptfast's engine, tokenised as lm-eval does."""
    with gptfast.Engine(folder) as engine:
        encode, end = engine.tokenizer.encode, engine.tokenizer.eos_token_id
        assert end is not None

        def continued(context: str, continuation: str) -> float:
            whole, before = encode(context + continuation), len(encode(context))
            return float(engine.token_logprobs(whole)[before - 1 :].double().sum())

        def rolled(text: str) -> float:
            ids, most = [end, *encode(text)], engine.config.n_positions - 2
            total = 0.0
            for begin in range(1, len(ids), most):  # windows as lm-eval cuts them: the last one looks back over a whole window
                stop = min(begin + most, len(ids))
                first = begin if begin == 1 else max(stop - most, 1)
                values = engine.token_logprobs(ids[first - 1 : stop])
                total += float(values[begin - first :].double().sum())
            return total

        texts = [f"{row['text']}\nSentiment:" for row in found[TASKS[0]]]
        return {
            TASKS[0]: [continued(text, f" {choice}") for text in texts for choice in ("negative", "positive")],
            TASKS[1]: [continued(row["context"], row["word"]) for row in found[TASKS[1]]],
            TASKS[2]: [rolled(row["text"]) for row in found[TASKS[2]]],
        }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -P tests/oracles/run_lm_eval.py", description="lm-eval against the server.")
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--lm-eval", required=True, metavar="PATH", help="the program lm_eval of an environment of its own")
    place = Path(os.environ.get("GPTFAST_DATA", ""))
    parser.add_argument("--data", type=Path, default=place, help="data sets (default: GPTFAST_DATA)")
    parser.add_argument("--limit", type=int, default=100, help="documents a task (default: 100)")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="gptfast-lm-eval-") as name, LiveServer(options.model) as server:
        folder, found = Path(name), documents(options.data, options.limit)
        write_tasks(folder, found)
        config = json.loads((options.model / "config.json").read_text())
        context = config["n_positions"]
        arguments = f"model={options.model.name},base_url={server.url}/v1/completions,tokenizer_backend=remote"
        served = run(options.lm_eval, folder, "served", "local-completions", f"{arguments},max_length={context}", 8)
        their_arguments = f"pretrained={options.model},dtype=float32,max_length={context - 2}"  # windows of equal lengths
        theirs = run(options.lm_eval, folder, "hf", "hf", their_arguments, 1)
        own = in_process(options.model, found)
    tokenizer = gptfast.GPT2Tokenizer.from_pretrained(options.model)
    requests = {task: [1] * len(values) for task, values in own.items()}
    requests[TASKS[2]] = [-(-len(tokenizer.encode(row["text"])) // (context - 2)) for row in found[TASKS[2]]]  # windows, summed
    failed = False
    for task in TASKS:
        for other, values in (("in process", own), ("hf", theirs)):
            off = [abs(a - b) / n for a, b, n in zip(served[task], values[task], requests[task], strict=True)]
            failed |= max(off) > ALLOWED
            count = sum(requests[task])
            print(f"{task}: {count} requests, served and {other} differ by at most {max(off):.2e} nats each (allowed {ALLOWED:g})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
