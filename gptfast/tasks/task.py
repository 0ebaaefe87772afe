"""What a task is: how its files are read, what the model sees and is trained on, what it answers, and how that is measured.

A task is a dataclass. Its fields with a help text are options of `gptfast finetune`, `predict` and `evaluate`; all its fields are
recorded in the folder of a fine-tuned model, in task.json, which transformers does not read. Later commands read it back. The
command line's help reads the options, so a task's module imports torch and what needs it inside its functions.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from gptfast.errors import Error, LoadError, shown
from gptfast.options import keys, read_mapping
from gptfast.tasks.files import Examples, Record, collect

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

FILE, VERSION = "task.json", 1
IGNORED = -100  # a target outside the loss mask


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example of a task's data; `line`: where it stands in its file (0: it was typed)."""

    line: int = 0


class Encoded(NamedTuple):
    """ids [T]; targets [T]: what position t is trained to predict, already shifted, or -100. A classifier's target is the number
    of the class, at the last token."""

    ids: list[int]
    targets: list[int]


@dataclass
class Task(ABC):
    """The protocol; a task overrides what is abstract, and of the rest what differs."""

    name: ClassVar[str]
    head: ClassVar[str] = "GPT2LMHeadModel"  # the model's class in gptfast.model
    columns: ClassVar[tuple[str, ...]]  # of a .tsv or .csv file, in this order where it has no header
    chosen_by: ClassVar[tuple[str, str]] = ("val_loss", "lowest")  # which evaluation's weights are kept; or "highest"

    # ------------------------------------------------------------------------------------------------------------------------ data

    @abstractmethod
    def parse(self, record: Record, labelled: bool = True) -> Example:
        """The example in one line of a file; `labelled` False: the answer may be missing. Raises gptfast.LoadError through
        record.error(...), which names file and line."""

    def read(self, path: str | Path, labelled: bool = True, skip_bad: bool = False) -> Examples[Any]:
        """The examples of a file. Raises gptfast.LoadError that names file and line, or with skip_bad counts such lines; in
        any case for a file without examples."""
        return collect(Path(path), self.columns, lambda record: self.parse(record, labelled), skip_bad)

    @abstractmethod
    def example(self, text: str) -> Example:
        """The example, without its answer, that `gptfast predict MODEL TEXT` means. Raises gptfast.Error where a text does not
        say enough."""

    def prepare(self, examples: Sequence[Any]) -> Self:
        """The task with what it has to know from its training examples (the names of the classes). Raises gptfast.Error where it
        cannot be trained on them."""
        return self

    @abstractmethod
    def encode(self, example: Any, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """What the model is trained on, at most `context` tokens. Raises gptfast.Error where the example does not fit and cannot be
        cut."""

    def encode_all(
        self, examples: Examples[Any], tokenizer: GPT2Tokenizer, context: int, skip_bad: bool = False
    ) -> list[Encoded]:
        """encode() of every example; an error names its file and line, or is counted in examples.skipped."""
        encoded = []
        for example in examples:
            try:
                encoded.append(self.encode(example, tokenizer, context))
            except Error as error:
                if not skip_bad:
                    raise Error(f"{examples.place(example.line)}: {error}") from error
                examples.skipped += 1
        if not encoded:
            raise Error(f"data {examples.path}: no example fits into a context of {context:,} tokens")
        return encoded

    # ------------------------------------------------------------------------------------------------------------- model in memory

    def configure(self, model: Any) -> None:  # noqa: B027 - most tasks need nothing
        """Fits a model that was loaded to the task before training (the number of classes of its head)."""

    @abstractmethod
    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """What `gptfast predict` returns for each example; "answer" holds its text."""

    @abstractmethod
    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Any]) -> dict[str, Any]:
        """What `gptfast evaluate` returns: the task's metrics over labelled examples."""

    def validate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Any]) -> dict[str, float]:
        """Metrics beside val_loss of each evaluation during training, on the examples held out. `chosen_by` may name one."""
        return {}

    def calibrate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Any]) -> Self:
        """The task as it is recorded after training, with what is fitted on held-out examples (a temperature, a threshold)."""
        return self

    # -------------------------------------------------------------------------------------------------------------------- settings

    def settings(self) -> dict[str, Any]:
        """All fields, as task.json holds them."""
        return dataclasses.asdict(self)

    def with_options(self, given: dict[str, Any]) -> Self:
        """The task with options changed. Raises gptfast.Error for one that it does not have."""
        own = keys(type(self))
        wrong = next((name for name in given if name not in own), None)
        if wrong is not None:
            allowed = ", ".join(key.flag for key in own.values()) or "none"
            raise Error(f"--{wrong.replace('_', '-')} is no option of the task {self.name}; its options: {allowed}")
        return dataclasses.replace(self, **given)

    @classmethod
    def from_settings(cls, values: Any, where: str) -> Self:
        """The task that settings() described. Raises gptfast.LoadError, naming `where`, for anything else."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= fields:
            raise LoadError(f"{where}: the settings of {cls.name} are {shown(values)}; allowed: {', '.join(sorted(fields))}")
        own = keys(cls)
        try:
            checked = read_mapping({name: value for name, value in values.items() if name in own}, own, where)
            return cls(**{**values, **checked})
        except LoadError:
            raise
        except (Error, TypeError, ValueError) as error:
            raise LoadError(f"{where}: {error}" if str(where) not in str(error) else str(error)) from error


def write(task: Task, folder: Path) -> None:
    """Records the task in a model's folder."""
    text = json.dumps({"version": VERSION, "task": task.name, "settings": task.settings()}, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
