"""A change of vocabulary renames tokens, and nothing else."""

import pytest
import torch

from sinkgd.lab.data import IGNORE_INDEX, Batch, VocabularyShift

SIZE, EOS = 50, 7


def shifted(at_step=10, seed=0):
    return VocabularyShift.drawn(at_step, vocab_size=SIZE, keep={EOS}, seed=seed)


def batch():
    ids = torch.randint(SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return Batch(ids, targets)


def test_every_token_has_one_new_id_and_the_special_ones_keep_theirs():
    new_ids = shifted().new_ids
    assert sorted(new_ids.tolist()) == list(range(SIZE))
    assert new_ids[EOS] == EOS
    assert (new_ids != torch.arange(SIZE)).float().mean() > 0.9


def test_a_seed_is_a_permutation():
    assert torch.equal(shifted(seed=3).new_ids, shifted(seed=3).new_ids)
    assert not torch.equal(shifted(seed=3).new_ids, shifted(seed=4).new_ids)


def test_inputs_and_targets_are_renamed_alike_and_padding_is_not():
    shift, before = shifted(), batch()
    after = shift.of_training(before, 10)
    names = dict(enumerate(shift.new_ids.tolist())) | {IGNORE_INDEX: IGNORE_INDEX}
    assert after.inputs.tolist() == [[names[i] for i in row] for row in before.inputs.tolist()]
    assert after.targets.tolist() == [[names[i] for i in row] for row in before.targets.tolist()]


@pytest.mark.parametrize(
    ("step", "trained", "scored"), [(9, False, False), (10, True, False), (11, True, True)]
)
def test_it_is_trained_on_first_and_scored_from_the_next_step(step, trained, scored):
    shift, before = shifted(at_step=10), batch()
    assert (shift.of_training(before, step) is not before) == trained
    assert (shift.of_evaluation(before, step) is not before) == scored
