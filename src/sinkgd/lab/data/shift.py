"""A sudden change of vocabulary: from a step on, every token has another's number.

The text stays as predictable as it was, and every row of the embedding and of the head is wrong at
once. How fast an optimizer recovers shows how much of its past it drags along.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkgd.lab.data.batches import Batch


@dataclass(frozen=True)
class VocabularyShift:
    """A permutation of token ids, from a step on.

    Args:
        at_step: Steps that train on the text as it is; the next one is the first of the shift.
        new_ids: ``(vocab_size,)``, int64: of each token, the id that stands for it afterwards.
    """

    at_step: int
    new_ids: Tensor

    @classmethod
    def drawn(
        cls, at_step: int, *, vocab_size: int, keep: Collection[int], seed: int
    ) -> "VocabularyShift":
        """Draw a permutation.

        Args:
            at_step: As above.
            vocab_size: Tokens.
            keep: Ids that stay what they are, such as that of the end of a document.
            seed: Equal seeds draw equal permutations.

        Examples:
            >>> shift = VocabularyShift.drawn(100, vocab_size=6, keep={0}, seed=0)
            >>> sorted(shift.new_ids.tolist()), shift.new_ids[0].item()
            ([0, 1, 2, 3, 4, 5], 0)
        """
        others = [i for i in range(vocab_size) if i not in keep]
        moved = torch.tensor(others, dtype=torch.int64, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order = torch.randperm(len(moved), generator=generator, dtype=torch.int64, device="cpu")
        new_ids = torch.arange(vocab_size, dtype=torch.int64, device="cpu")
        new_ids[moved] = moved[order]
        return cls(at_step, new_ids)

    def of_training(self, batch: Batch, step: int) -> Batch:
        """Return the batch that is trained on after ``step`` steps."""
        return self._renamed(batch) if step >= self.at_step else batch

    def of_evaluation(self, batch: Batch, step: int) -> Batch:
        """Return the batch that is scored after ``step`` steps: as the last step's was."""
        return self._renamed(batch) if step > self.at_step else batch

    def _renamed(self, batch: Batch) -> Batch:
        ids = batch.targets.clamp(min=0)  # what is not scored has no id
        targets = torch.where(batch.targets < 0, batch.targets, self.new_ids[ids])
        return Batch(self.new_ids[batch.inputs], targets)
