"""One gradient for the model's attention and for the rows that are read of its queries."""

import pytest
import torch
from kernel_support import assert_exact, randn
from torch.nn import functional

import mekernels
from mekernels.attention_rows import picked_rows, share_query, shared_query

ROWS = torch.tensor([[1, -1, 8, 3], [0, 4, 4, -1]])
LIMITS = torch.tensor([[[0, 5], [0, 9], [2, 7], [1, 3]], [[0, 1], [0, 9], [3, 6], [0, 0]]])
ATTENTIONS = {
    "sdpa": lambda query, key: functional.scaled_dot_product_attention(query, key, key),
    "eager": lambda query, key: (query @ key.mT).softmax(-1),
    "two uses": lambda query, key: query * 3 + query.sin(),
    "transposed": lambda query, key: query.transpose(1, 2) * 2,
}
SHARING = {
    "a sum": lambda query, other: query + other,
    "a sum of views": lambda query, other: query.transpose(1, 2) + other.transpose(1, 2),
    "a reshaped sum": lambda query, other: query.flatten(1) + other.flatten(1),
    "a concatenation": lambda query, other: torch.cat([query, other], 2),
    "an expanded gradient": lambda query, other: query.sum((1, 2, 3), keepdim=True) + other,
}


def inputs():
    return randn(2, 4, 9, 6).requires_grad_(), randn(2, 2, 9, 6, seed=1).requires_grad_()


def loss(query, key, attention, share, **options):
    """The loss of the model's attention and of the rows that are read."""
    query, other = query * 1.5, key.repeat_interleave(2, 1)
    if share:
        query, picked = share_query(query, ROWS)
        places, limits = picked_rows(ROWS, 9, 9, **options)
        read = mekernels.attention_rows(picked, key, places, slice(1, 7), key_range=limits)
    else:
        read = mekernels.attention_rows(query, key, ROWS, slice(1, 7), **options)
    return attention(query, other).square().sum() + (read * randn(*read.shape, seed=3)).sum()


def gradients(attention, share, **options):
    pair = inputs()
    return torch.autograd.grad(loss(*pair, attention, share, **options), pair)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "key_range": LIMITS}])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_are_those_of_the_whole_query(attention, options):
    wanted = gradients(ATTENTIONS[attention], False, **options)
    for one, other in zip(gradients(ATTENTIONS[attention], True, **options), wanted, strict=True):
        assert_exact(one, other)


@pytest.fixture
def copies(monkeypatch):
    """For each gradient to which rows are added: whether it was copied first."""
    found = []
    original = torch.Tensor.clone

    def clone(tensor, **options):
        found.append(tensor.shape)
        return original(tensor, **options)

    shared_query._alone(False), shared_query._alone(True)
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    return found


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_are_added_to_the_gradient_that_is_there(attention, copies):
    gradients(ATTENTIONS[attention], True)
    assert copies == []


@pytest.mark.parametrize("attention", SHARING)
def test_a_gradient_that_others_hold_is_copied(attention, copies):
    actual = gradients(SHARING[attention], True)
    assert len(copies) == 1
    for one, other in zip(actual, gradients(SHARING[attention], False), strict=True):
        assert_exact(one, other)


@pytest.mark.parametrize("view", [False, True])
def test_a_gradient_that_a_hook_keeps_does_not_change(view):
    kept, query = [], inputs()[0]
    shared, picked = share_query(query * 1.0, ROWS)
    used = shared.transpose(1, 2) if view else shared
    used.register_hook(kept.append)
    ((used * 2).sum() + picked.sum()).backward()
    assert (kept[0] == 2).all()
    assert query.grad[0, 0, 1, 0] == 3


def test_either_use_may_be_missing():
    query = inputs()[0]
    shared, picked = share_query(query, ROWS)
    (only,) = torch.autograd.grad(picked.sum(), query, retain_graph=True)
    assert only[1, 0, :, 0].tolist() == [2, 0, 0, 0, 2, 0, 0, 0, 0]
    (only,) = torch.autograd.grad(shared.sum(), query)
    assert (only == 1).all()


def test_it_compiles():
    pair = inputs()
    compiled = torch.compile(loss, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*pair, ATTENTIONS["eager"], True), pair)
    for one, other in zip(actual, gradients(ATTENTIONS["eager"], False), strict=True):
        assert_exact(one, other)
