"""Cross-entropy against a distribution of which the largest entries and the mass of the rest are kept."""

import pytest
import torch

from conceptx.train.targets import Targets, cross_entropy

V = 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(logits, k, learn=None):
    """Targets that are the softmax of logits (n, t, v), cut to k entries."""
    values, indices = logits.softmax(-1).topk(k)
    n, t = logits.shape[:2]
    learn = torch.ones(n, t) if learn is None else learn
    rest = (1 - values.sum(-1)).clamp(min=0)
    return Targets(torch.zeros(n, t, dtype=torch.long), torch.full((n,), t), indices, values, rest, learn)


def test_by_hand():
    p = torch.tensor([0.5, 0.3, 0.2])
    targets = Targets(
        ids=torch.zeros(1, 2, dtype=torch.long),
        length=torch.tensor([2]),
        indices=torch.tensor([[[2], [0]]]),
        probabilities=torch.tensor([[[0.75], [1.0]]]),
        rest=torch.tensor([[0.25, 0.0]]),
        learn=torch.ones(1, 2),
    )
    loss = cross_entropy(p.log().expand(1, 2, 3), targets)
    first = -(0.75 * p[2].log() + 0.25 * (1 - p[2]).log())
    # one logarithm and one sum in float32
    torch.testing.assert_close(loss, ((first - p[0].log()) / 2)[None], rtol=1e-6, atol=0)


def test_the_full_vocabulary_is_the_cross_entropy_of_torch():
    logits, teacher = normal(2, 3, V), normal(2, 3, V, seed=1)
    wanted = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), teacher.softmax(-1).reshape(-1, V), reduction="none"
    )
    # the kept sum may miss one by 1e-7, which counts as rest with a log of at most log(1e-6): 2e-6
    torch.testing.assert_close(cross_entropy(logits, kept(teacher, V)), wanted.reshape(2, 3).mean(1), rtol=0, atol=1e-5)


def test_one_hot_targets_are_the_likelihood_of_the_tokens():
    logits, tokens = normal(2, 3, V), torch.tensor([[1, 2, 3], [4, 5, 6]])
    hard = Targets(
        tokens, torch.tensor([3, 3]), tokens[..., None], torch.ones(2, 3, 1), torch.zeros(2, 3), torch.ones(2, 3)
    )
    wanted = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].mean(1)
    assert torch.equal(cross_entropy(logits, hard), wanted)


@pytest.mark.parametrize("k", [1, 3, V])
def test_the_gradient_vanishes_at_the_target_also_where_a_rest_is_left(k):
    """And nowhere else: another student has a gradient, and the loss at the target is the least."""
    teacher = normal(2, 4, V, seed=1)
    targets = kept(teacher, k)

    def loss_and_gradient(logits):
        student = logits.clone().requires_grad_(True)
        loss = cross_entropy(student, targets).sum()
        return float(loss), torch.autograd.grad(loss, student)[0].abs().max()

    least, gradient = loss_and_gradient(teacher)
    assert gradient < 1e-6  # float32 rounding of terms of size 1
    higher, elsewhere = loss_and_gradient(normal(2, 4, V, seed=2))
    assert higher > least + 0.1 and elsewhere > 1e-2


def test_the_loss_at_the_target_is_the_entropy_of_the_grouped_distribution():
    teacher = normal(1, 5, V)
    targets = kept(teacher, 3)
    grouped = torch.cat([targets.probabilities, targets.rest[..., None]], -1)
    entropy = torch.special.entr(grouped).sum(-1).mean(1)
    torch.testing.assert_close(cross_entropy(teacher, targets), entropy, rtol=1e-5, atol=0)  # float32 logarithms


def test_only_positions_that_count_are_averaged():
    logits, teacher = normal(2, 4, V), normal(2, 4, V, seed=1)
    learn = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0]])
    part = cross_entropy(logits, kept(teacher, 3, learn))
    each = torch.stack([cross_entropy(logits[:, i : i + 1], kept(teacher[:, i : i + 1], 3)) for i in range(4)], 1)
    wanted = torch.stack([each[0, 1:3].mean(), each[1, 0]])
    torch.testing.assert_close(part, wanted, rtol=1e-6, atol=0)  # the order of a float32 sum
    assert torch.equal(cross_entropy(logits, kept(teacher, 3, torch.zeros(2, 4))), torch.zeros(2))  # none: no NaN


def test_a_student_that_is_certain_has_a_finite_loss():
    certain = torch.full((1, 1, V), -1e4)
    certain[..., 0] = 1e4
    student = certain.requires_grad_(True)
    loss = cross_entropy(student, kept(torch.zeros(1, 1, V), 2))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())


def test_rows_drop_padding_and_keep_everything_else():
    targets = Targets.empty([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], 2, [0, 1, 2])
    assert targets.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert targets.learn.tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    part = targets.rows([2, 1])
    assert part.ids.tolist() == [[8, 9, 10], [6, 7, 0]] and part.length.tolist() == [3, 2]
    assert part.mask.tolist() == [[1, 1, 1], [1, 1, 0]] and part.learn.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert part.indices.shape == (2, 3, 2) and len(part) == 2
    assert targets.rows(torch.tensor([0])).ids.tolist() == [[1, 2, 3, 4, 5]]


def test_padding_changes_no_loss():
    logits, teacher = normal(1, 3, V), normal(1, 3, V, seed=1)
    short = kept(teacher, 2)
    padded = Targets(
        *(
            torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, 2)) if t.ndim > 1 else t
            for t in short.tensors().values()
        )
    )
    wide = torch.cat([logits, normal(1, 2, V, seed=3)], 1)
    torch.testing.assert_close(cross_entropy(wide, padded), cross_entropy(logits, short), rtol=1e-6, atol=0)
