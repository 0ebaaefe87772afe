"""Commands about tasks: finetune and predict (evaluate is in run.py)."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gptfast.commands import RUN, TRAIN, Common, Config, Model, PrintConfig, SkipBad, command, running
from gptfast.config import LoraConfig, TrainConfig
from gptfast.errors import Error, LoadError
from gptfast.options import keys, layers, read_mapping, to_yaml
from gptfast.tasks import find, names
from gptfast.tasks.options import DEFAULTS, FINETUNE, LORA, TASK, TRAINING, FinetuneConfig

TASKS = f"{', '.join(names())}, sentiment"
TaskName = Annotated[str | None, typer.Option("--task", metavar="NAME", help="the task", show_default="the model's")]


@command(TRAIN, "backend", Fine_tuning=FINETUNE, Task=TASK, LoRA=LORA, Training=TRAINING)
def finetune(
    model: Model,
    common: Common,
    given: dict[str, Any],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="the task's examples", show_default="required")],
    out: Annotated[str, typer.Option("--out", metavar="RUN", help="new folder for the run", show_default="required")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help=TASKS, show_default="required")] = None,
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out", show_default="off")] = False,
    print_config: PrintConfig = False,
) -> dict[str, Any]:
    """Train a model for a task; RUN becomes a folder that predict, evaluate, chat and serve know the task of.

    What runs: command line > --config file > with --resume what the run recorded > default.
    """
    known = {**FINETUNE, **TASK, **LORA, **TRAINING}
    old = _recorded(out, model, data, known) if resume else {}
    name = task or old.pop("task", None)
    if name is None:
        raise Error(f"--task is needed; allowed: {TASKS}")
    cls = find(name)
    sources = layers(given, config, {**DEFAULTS, **{key: value for key, value in old.items() if key in known}}, known)
    wanted = cls().with_options({key: value for key, value in sources.merged().items() if key in TASK})
    settings = sources.build(TrainConfig, data=data, out=out, init=model, warmup=0)
    options, adapters = sources.build(FinetuneConfig), sources.build(LoraConfig)
    if not options.lora and (unused := sorted(set(given) & set(LORA))):
        raise Error(f"{LORA[unused[0]].flag} describes adapters; give --lora too")
    if print_config:
        own = ("Fine-tuning", options, FINETUNE), ("Task", wanted, keys(cls))
        parts = (*own, ("LoRA", adapters, LORA), ("Training", settings, TRAINING))
        if not common.json:
            print("".join(to_yaml(*part) for part in parts), end="")
        return {"task": cls.name, **{key: getattr(part, key) for _, part, names_ in parts for key in names_}}
    from gptfast.tasks.finetune import finetune as fit

    shared = Common(device=settings.device, threads=settings.threads, backend=common.backend)
    with running(shared, show=False):
        result = fit(wanted, settings, options, adapters if options.lora else None, resume=resume)
    if not common.json:
        kept = f"; kept are the weights of step {result['best_step']:,}" if "best_step" in result else ""
        metrics = {key: result[key] for key in result if key in ("accuracy", "val_loss", "bleu")}
        told = "".join(f", {key} {value:.4f}" for key, value in metrics.items())
        print(f"{out}: {result['task']}, {result['step']:,} steps{kept}{told}")
    return result


def _recorded(out: str, model: str, data: str, known: dict[str, Any]) -> dict[str, Any]:
    """The options of the run to resume, and its task. Raises gptfast.Error where MODEL or --data is another than the run's."""
    from gptfast.tasks.finetune import recorded

    facts = recorded(out)
    parts = [facts.get(part) or {} for part in ("training", "options", "settings", "lora")]
    if not all(isinstance(part, dict) for part in parts):
        raise LoadError(f"run {out}: its log is damaged")
    for name, value in (("init", model), ("data", data)):
        if parts[0].get(name) != value:
            raise Error(f"resume: {'MODEL' if name == 'init' else '--data'} was {parts[0].get(name)}, now it is {value}")
    values = {key: value for part in parts for key, value in part.items() if key in known}
    return {**read_mapping(values, known, f"run {out}"), "task": facts.get("task")}


@command(RUN, "device dtype threads backend", Task=TASK)
def predict(
    model: Model,
    common: Common,
    given: dict[str, Any],
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="what to answer", show_default="none")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="unanswered examples", show_default="none")] = None,
    task: TaskName = None,
    skip_bad: SkipBad = False,
) -> dict[str, Any]:
    """Answer with a model that was fine-tuned for a task: one line a text."""
    with running(common) as device:
        from gptfast.tasks.run import predict as answer

        result = answer(model, text or (), data, task, given, skip_bad=skip_bad, dtype=common.dtype or "fp32", device=device)
    if not common.json:
        for found in result["answers"]:
            print(found["answer"] + (f"\t{found['probability']:.3f}" if "probability" in found else ""))
    return {"model": model, **result}
