"""What a model is trained for and measured by: one module a task, on the protocol in task.py; finetune.py trains, run.py answers.

Tasks are known by name here. Nothing in this package imports torch before it is needed: the command line's help reads its options.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from gptfast.errors import Error, LoadError, shown
from gptfast.options import nearest
from gptfast.tasks.task import FILE, VERSION, Task

_HOME = {
    "lm": ("language_modelling", "LanguageModelling"),
    "dialogue": ("dialogue", "Dialogue"),
    "classification": ("classification", "Classification"),
    "translation": ("translation", "Translation"),
    "qa": ("question_answering", "QuestionAnswering"),
}
ALIASES = {"sentiment": "classification", "question_answering": "qa", "language_modelling": "lm"}


def names() -> list[str]:
    """The tasks, without their aliases."""
    return list(_HOME)


def find(name: str) -> type[Task]:
    """The class of a task. Raises gptfast.Error, with the names there are, for another."""
    plain = ALIASES.get(name.replace("-", "_"), name)
    if plain not in _HOME:
        raise Error(f"task is {shown(name)}{nearest(name, [*_HOME, *ALIASES])}; allowed: {', '.join(_HOME)}, sentiment")
    module, cls = _HOME[plain]
    return getattr(import_module(f"gptfast.tasks.{module}"), cls)  # type: ignore[no-any-return]


def recorded(folder: str | Path) -> Task | None:
    """The task that a model's folder was fine-tuned for; None where none is recorded. Raises gptfast.LoadError where task.json is
    damaged, of another version, or names a task that is not there."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    from gptfast.hub import read_json

    facts: dict[str, Any] = read_json(path)
    if facts.get("version") != VERSION:
        raise LoadError(f"{path}: version {shown(facts.get('version'))}, this gptfast reads {VERSION}")
    try:
        cls = find(str(facts.get("task")))
    except Error as error:
        raise LoadError(f"{path}: {error}") from None
    return cls.from_settings(facts.get("settings"), str(path))
