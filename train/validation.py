"""Validation while training: held-out loss and exact answers, on batches that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.chat import IGNORE_INDEX
from data.dataset import ConversationDataset
from data.rows import DataError
from models.batch_facts import next_labels
from recipes.schema import EvalSection, RecipeError
from train import distributed
from train.stop import ignore_signals

SHORT_ANSWER: Final = 10  # tokens, end mark included, of an answer that counts for accuracy
_SUMS: Final = 4  # loss, labelled tokens, exact answers, short answers


class Validation:
    """The held-out samples of a phase, and the sums over one evaluation of them.

    Attributes:
        section: the recipe's.
        samples: the held-out samples.
    """

    def __init__(self, section: EvalSection, samples: ConversationDataset) -> None:
        self.section, self.samples = section, samples
        self._names = samples.config.names
        self._sums: Tensor | None = None
        if section.metric == "accuracy" and not any(map(_has_short_answer, samples.rows["labels"])):
            raise RecipeError(
                f"eval.metric: got accuracy, but no held-out answer has up to {SHORT_ANSWER} tokens; expected loss"
            )

    def loader(self, collate: Callable[[Sequence[Mapping[str, Any]]], Any], *, batch: int) -> DataLoader[Any]:
        """Returns this rank's forward passes of up to `batch` samples."""
        batches = rank_batches(
            self.samples.lengths, self.samples.has_image, batch=batch, ranks=distributed.world_size()
        )
        return DataLoader(
            _WithFillers(self.samples),
            batch_sampler=list(batches)[distributed.rank() :: distributed.world_size()],
            collate_fn=collate,
            num_workers=self.samples.config.workers,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # an evaluation must not change the global random state of the training
        )

    @torch.no_grad()
    def add(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Adds a batch of the collator's to the sums. The head runs on labelled positions alone."""
        labels, sources = inputs.pop("labels"), inputs.pop("sources")
        following = next_labels(labels)
        labelled = following != IGNORE_INDEX
        # with labels, because a plan that keeps tokens by attention then asks at the ends of the instructions
        logits = model(**inputs, labels=labels, logits_to_keep=labelled, use_cache=False).logits.float()
        targets = following[labelled]
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        begins = labelled & ~nn.functional.pad(labelled[:, :-1], (1, 0))
        answer = begins.flatten().cumsum(0)[labelled.flatten()] - 1  # the answer that each labelled token is of
        size = torch.bincount(answer, minlength=int(begins.sum()))
        wrong = torch.bincount(answer, (logits.argmax(dim=-1) != targets).double(), minlength=len(size))
        is_short = size <= SHORT_ANSWER
        cells = 2 * sources + int("pixel_values" in inputs)
        if self._sums is None:
            shape = 2 * len(self._names), _SUMS
            self._sums = torch.zeros(shape, dtype=torch.float64, device=labels.device)
        of_tokens = cells[labelled.nonzero()[:, 0]]
        of_answers = cells[begins.nonzero()[:, 0]]
        ones = torch.ones_like(losses, dtype=torch.float64)
        self._sums[:, :2].index_add_(0, of_tokens, torch.stack([losses.double(), ones], dim=1))
        exact = torch.stack([is_short & (wrong == 0), is_short], dim=1)
        self._sums[:, 2:].index_add_(0, of_answers, exact.double())

    def report(self) -> dict[str, float]:
        """Returns the means since the last report, over all ranks; every rank must call it.

        Returns:
            eval_loss, the mean over labelled tokens; eval_accuracy, the share of short answers that greedy decoding
            gives exactly, where there are any; each also for samples with and without images (`_image`, `_text`) and
            for each source, where there are several.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            raise DataError("eval: got no held-out sample, expected at least one")
        if dist.is_initialized():
            dist.all_reduce(sums)
        cells = sums.cpu().unflatten(0, (-1, 2))
        parts = {"": cells.sum(dim=(0, 1)), "_text": cells[:, 0].sum(dim=0), "_image": cells[:, 1].sum(dim=0)}
        if len(self._names) > 1:
            parts |= {f"_{name}": cells[number].sum(dim=0) for number, name in enumerate(self._names)}
        found: dict[str, float] = {}
        for name, part in parts.items():
            loss, labels, exact, answers = part.tolist()
            found |= {f"eval_loss{name}": loss / labels} if labels else {}
            found |= {f"eval_accuracy{name}": exact / answers} if answers else {}
        return found

    def is_due(self, step: int) -> bool:
        """Returns whether an evaluation follows this step."""
        return step > 0 and step % self.section.every == 0

    def is_stalled(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether `patience` evaluations in a row were no better than one before them.

        `history` is Trainer's, which a resumed run has from its checkpoint. transformers' EarlyStoppingCallback counts
        in an object that is restored together with the stop that ended the run.
        """
        key = f"eval_{self.section.metric}"
        values = [line[key] for line in history if key in line]
        if self.section.patience is None or not values:
            return False
        best = values.index(max(values) if self.section.metric == "accuracy" else min(values))
        return len(values) - 1 - best >= self.section.patience


def rank_batches(lengths: Sequence[int], has_image: Sequence[bool], *, batch: int, ranks: int) -> Iterator[list[int]]:
    """Yields forward passes of up to `batch` samples of one modality, by length; each rank takes every `ranks`-th.

    All ranks get as many, and at the same time of the same modality: under ZeRO-3 each waits for the others in every
    module. Where the samples do not come out even, -1 - sample stands for a filler: that sample without its labels.
    """
    for modality in (True, False):
        members = sorted((n for n, found in enumerate(has_image) if bool(found) is modality), key=lambda n: lengths[n])
        if not members:
            continue
        passes = -(-len(members) // (batch * ranks)) * ranks
        size = -(-len(members) // passes)
        members += [-1 - members[0]] * (passes * size - len(members))
        yield from (members[start : start + size] for start in range(0, len(members), size))


class _WithFillers(Dataset[dict[str, Any]]):
    def __init__(self, samples: ConversationDataset) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._samples[index if index >= 0 else -1 - index]
        for fault in sample.get("faults", ()):  # another sample stands for it: figures could not be compared
            raise DataError(f"eval: {fault}; it could be read when the run started")
        return sample if index >= 0 else {**sample, "labels": torch.full_like(sample["labels"], IGNORE_INDEX)}


def _has_short_answer(labels: Sequence[int]) -> bool:
    """Returns whether some run of labels has up to SHORT_ANSWER of them."""
    runs = groupby(labels, lambda label: label != IGNORE_INDEX)
    return any(is_answer and len(list(run)) <= SHORT_ANSWER for is_answer, run in runs)
