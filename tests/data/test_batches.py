"""Order, packing and collation: nothing lost, nothing doubled, the same again from any position."""

import itertools

import pytest
import torch

from data.batches import Batches, first_fit, fit_seq_len


class Dataset:
    """Example i holds the token i, and its targets i + 1, `lengths[i]` times; the last target is ignored."""

    images = None

    def __init__(self, lengths):
        self.lengths = lengths
        self.target_counts = [length - 1 for length in lengths]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        n = self.lengths[i]
        targets = torch.full((n,), i + 1, dtype=torch.int32)
        targets[-1] = -100
        return torch.full((n,), i, dtype=torch.int32), targets


LENGTHS = [5, 3, 8, 2, 2, 6, 4, 7, 3, 5, 2]


def test_padded_batches_in_file_order():
    batches = Batches(Dataset(LENGTHS), batch_size=4, pad_id=9)
    first = next(batches.one_epoch())
    assert first.input_ids.tolist()[1] == [1, 1, 1, 9, 9, 9, 9, 9]
    assert first.target_tokens == sum(LENGTHS[:4]) - 4
    assert first.targets.tolist() == [1] * 4 + [2] * 2 + [3] * 7 + [4]
    assert first.input_ids.flatten()[first.target_index].tolist() == [t - 1 for t in first.targets.tolist()]
    assert [len(batch.input_ids) for batch in batches.one_epoch()] == [4, 4, 3]
    assert [batch.rows for batch in batches.one_epoch()] == [
        [[0], [1], [2], [3]],
        [[4], [5], [6], [7]],
        [[8], [9], [10]],
    ]
    assert next(Batches(Dataset(LENGTHS), batch_size=1, pad_multiple=8).one_epoch()).input_ids.shape == (1, 8)


@pytest.mark.parametrize("options", [{}, {"pad_multiple": 4}, {"packing": True}, {"packing": True, "pad_multiple": 4}])
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_the_largest_batch_is_known_beforehand(options, steps):
    options = dict(batch_size=2, grad_accum=2, shuffle=True, seq_len=8, **options)
    found = list(Batches(Dataset(LENGTHS), **options).first(max(steps, 1)))
    tokens, targets = (
        max(sizes) for sizes in zip(*((b.input_ids.numel(), b.target_tokens) for b in found), strict=True)
    )
    assert Batches(Dataset(LENGTHS), **options).largest(steps) == (tokens, targets)


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_has_every_row_once_in_a_new_order(packing):
    batches = Batches(Dataset(LENGTHS), batch_size=2, packing=packing, seq_len=8, shuffle=True, seed=3)
    orders = [[i for micro in batches.plan(epoch) for row in micro for i in row] for epoch in range(3)]
    assert all(sorted(order) == list(range(len(LENGTHS))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    again = Batches(Dataset(LENGTHS), batch_size=2, packing=packing, seq_len=8, shuffle=True, seed=3)
    assert [[i for micro in again.plan(2) for row in micro for i in row]] == orders[2:]
    other = Batches(Dataset(LENGTHS), batch_size=2, packing=packing, seq_len=8, shuffle=True, seed=4)
    assert [i for micro in other.plan(0) for row in micro for i in row] != orders[0]


def test_steps_group_micro_batches_and_go_on_from_anywhere():
    def batches():
        return Batches(Dataset(LENGTHS), batch_size=2, grad_accum=4, shuffle=True)

    steps = list(itertools.islice(batches().steps(), 6))
    assert [(epoch, step, len(micro)) for epoch, step, micro in steps[:4]] == [
        (0, 0, 4),
        (0, 1, 2),
        (1, 0, 4),
        (1, 1, 2),
    ]
    resumed = list(itertools.islice(batches().steps(epoch=1, step_in_epoch=1), 2))
    for (_, _, a), (_, _, b) in zip(steps[3:5], resumed, strict=True):
        assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(a, b, strict=True))
    # a checkpoint after an epoch's last step names a step that the epoch does not have: the next epoch follows
    assert next(batches().steps(epoch=0, step_in_epoch=2))[:2] == (1, 0)
    assert batches().total_steps(3, None) == 6
    assert batches().total_steps(3, 4) == 4 and batches().total_steps(3, 0) == 0


def test_only_the_guilty_flag_is_accused():
    batches = Batches(Dataset(LENGTHS), batch_size=2)
    for call, words in [
        (lambda: Batches(Dataset(LENGTHS), batch_size=0), "--batch-size 0 must be at least 1"),
        (lambda: Batches(Dataset(LENGTHS), batch_size=2, grad_accum=-1), "--grad-accum -1 must be at least 1"),
        (lambda: batches.total_steps(0, 2), "--epochs 0 must be at least 1"),
        (lambda: batches.total_steps(1, -2), "--max-steps -2 must not be negative"),
    ]:
        with pytest.raises(ValueError, match=f"^{words}$"):
            call()


def test_packed_collation():
    batches = Batches(Dataset([3, 2, 4]), batch_size=2, packing=True, seq_len=6, pad_id=7)
    (batch,) = batches.one_epoch()
    assert batch.input_ids.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 7]] and batch.rows == [[0, 1], [2]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert batch.targets.tolist() == [1, 1, 2, 3, 3, 3]


def test_first_fit_fills_gaps_within_its_window():
    assert first_fit([0, 1, 2, 3], [5, 6, 3, 2], 8) == [[0, 2], [1, 3]]
    assert first_fit([0, 1, 2], [5, 6, 3], 8, window=1) == [[0], [1], [2]]
    lengths = torch.randint(1, 100, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = first_fit(list(range(2000)), lengths, 128)
    assert sorted(i for b in bins for i in b) == list(range(2000))
    assert all(sum(lengths[i] for i in b) <= 128 for b in bins)
    assert sum(lengths) / (128 * len(bins)) > 0.95


def test_sequence_length():
    assert fit_seq_len(None, 512) == 512 and fit_seq_len(None, 131072) == 2048 and fit_seq_len(100, 512) == 100
    with pytest.raises(ValueError, match="9000 exceeds this model's 8192"):
        fit_seq_len(9000, 8192)
    with pytest.raises(ValueError, match="at least 2"):
        fit_seq_len(1, 8192)
