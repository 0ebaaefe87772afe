"""Classification (sentiment is one): a linear head on the last token of a text, with calibrated probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gptfast.errors import Error, shown
from gptfast.tasks.answers import BATCH, by_length
from gptfast.tasks.files import Record
from gptfast.tasks.task import IGNORED, Encoded, Example, Task

if TYPE_CHECKING:
    from gptfast.tasks.metrics import Floats
    from gptfast.tokenizer import GPT2Tokenizer


@dataclass(frozen=True, kw_only=True)
class Labelled(Example):
    """A text and the name of its class, "" where that is unknown."""

    text: str
    label: str = ""


@dataclass
class Classification(Task):
    """.tsv, .csv or .jsonl with text and label. The classes' names and the temperature are found in training and recorded."""

    name: ClassVar[str] = "classification"
    head: ClassVar[str] = "GPT2ForSequenceClassification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    chosen_by: ClassVar[tuple[str, str]] = ("accuracy", "highest")

    labels: list[str] = field(default_factory=list)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
            raise Error(f"labels are {shown(self.labels)}; a list of names is needed")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 1e-3 <= self.temperature <= 1e3:
            raise Error(f"temperature is {shown(self.temperature)}; allowed: 0.001 to 1000")

    def parse(self, record: Record, labelled: bool = True) -> Labelled:
        """Raises gptfast.LoadError for a text or a label that is missing or, once the classes are known, not among them."""
        text, label = record.text("text"), record.values.get("label")
        if not labelled:
            return Labelled(line=record.line, text=text)
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise record.error("label is missing" if label is None else f"label is {shown(label)}; a name or a number is needed")
        name = str(label).strip()
        if not name:
            raise record.error("label is empty")
        if self.labels and name not in self.labels:
            raise record.error(f"label is {shown(name)}; the model's classes: {', '.join(self.labels)}")
        return Labelled(line=record.line, text=text, label=name)

    def example(self, text: str) -> Labelled:
        """Any text that is not blank."""
        if not text.strip():
            raise Error("text is empty; there is nothing to classify")
        return Labelled(text=text)

    def prepare(self, examples: Sequence[Labelled]) -> Self:
        """Takes the names of the classes from the examples: numbers in their order, other names in the alphabet's."""
        names = sorted({example.label for example in examples})
        if len(names) < 2:
            raise Error(f"every example has the label {shown(names[0])}; at least two classes are needed")
        if all(name.lstrip("-").isdecimal() for name in names):
            names.sort(key=int)
        return dataclasses.replace(self, labels=names)

    def encode(self, example: Labelled, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """The first `context` tokens; the class is the target of the last one."""
        ids = tokenizer.encode(example.text)[:context]
        return Encoded(ids, [*[IGNORED] * (len(ids) - 1), self.labels.index(example.label)])

    def configure(self, model: Any) -> None:
        """Names the classes in the config, and gives the model a new head unless it has one for the same classes."""
        import torch

        from gptfast.layers import Linear

        names = dict(enumerate(self.labels))
        if model.config.id2label != names:
            model.config.id2label, model.config.num_labels = names, len(names)
            model.score = Linear(model.config.n_embd, len(names), bias=False)
            torch.nn.init.normal_(model.score.weight, std=model.config.initializer_range)
        model.config.problem_type = "single_label_classification"
        if model.config.pad_token_id is None:
            model.config.pad_token_id = model.config.eos_token_id

    def logits(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Labelled]) -> Floats:
        """The head's outputs [N, K], before the temperature. Raises gptfast.Error where no classes are recorded."""
        import numpy as np
        import torch

        from gptfast.generation.loop import evaluating

        if not self.labels:
            raise Error("no names of classes are recorded: this model was not fine-tuned for classification")
        rows = [ids[: model.config.n_positions] for ids in tokenizer([example.text for example in examples])["input_ids"]]
        out = np.empty((len(rows), len(self.labels)))
        with torch.no_grad(), evaluating(model):
            for group in by_length([len(row) for row in rows], BATCH):
                width = max(len(rows[number]) for number in group)
                ids, mask = torch.zeros(len(group), width, dtype=torch.int64), torch.zeros(len(group), width, dtype=torch.int64)
                for place, number in enumerate(group):
                    ids[place, : len(rows[number])] = torch.tensor(rows[number])
                    mask[place, : len(rows[number])] = 1
                found = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
                out[group] = found.double().cpu().numpy()
        return out

    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Labelled]) -> list[dict[str, Any]]:
        """The likeliest class of each text, its probability, and all classes' probabilities, after temperature scaling."""
        from gptfast.tasks.metrics import softmax

        answers = []
        for row in softmax(self.logits(model, tokenizer, examples), self.temperature).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            every = dict(zip(self.labels, row, strict=True))
            answers.append({"answer": self.labels[best], "probability": row[best], "probabilities": every})
        return answers

    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Labelled]) -> dict[str, Any]:
        """examples, accuracy, macro_f1, loss (nats), ece and ece_unscaled (before temperature scaling), temperature."""
        import numpy as np

        from gptfast.tasks.metrics import report

        logits = self.logits(model, tokenizer, examples)
        labels = np.array([self.labels.index(example.label) for example in examples])
        return {"examples": len(examples), **report(labels, logits, self.temperature)}

    def validate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Labelled]) -> dict[str, float]:
        """accuracy, loss (nats)."""
        found = self.measure(model, tokenizer, examples)
        return {"accuracy": found["accuracy"], "loss": found["loss"]}

    def calibrate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Labelled]) -> Self:
        """Fits the temperature (Guo et al. 2017) on the examples held out of training."""
        import numpy as np

        from gptfast.tasks.metrics import fit_temperature

        labels = np.array([self.labels.index(example.label) for example in examples])
        return dataclasses.replace(self, temperature=fit_temperature(labels, self.logits(model, tokenizer, examples)))
