"""Cross-stream memory against whole softmax maps in float64, row by row."""

from __future__ import annotations

import pytest
import torch

from motionenhancer.teachers.attention import ReadingProcessor


class Reader:
    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        self.seen.append((query, key, lse, fold))

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        raise AssertionError("self-attention only")


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("row", [0, 1])
def test_generated_rows_see_their_own_reference_after_themselves(row: int, read: bool) -> None:
    generator = torch.Generator().manual_seed(row)
    query, key, value = (torch.randn(4, 2, 9, 8, generator=generator) for _ in range(3))
    reader = Reader()
    out = ReadingProcessor(reader if read else None, memory=True, row=row).attend(query, key, value)
    for i in range(2):
        own_and_reference = [torch.cat([t[i], t[i + 2]], dim=1) for t in (key, value)]
        torch.testing.assert_close(out[i].double(), naive(query[i], *own_and_reference), rtol=1e-5, atol=1e-6)
        alone = naive(query[i + 2], key[i + 2], value[i + 2])
        torch.testing.assert_close(out[i + 2].double(), alone, rtol=1e-5, atol=1e-6)
    if not read:
        assert not reader.seen
        return
    [(seen_query, seen_key, lse, fold)] = reader.seen
    assert fold == 2
    assert torch.equal(seen_query, query[row : row + 1])
    assert torch.equal(seen_key, torch.cat([key[row], key[row + 2]], dim=1)[None])
    scores = seen_query.double() @ seen_key.double().transpose(-1, -2) * 8**-0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-6)


def test_without_memory_every_row_stands_alone() -> None:
    query, key, value = (
        torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    reader = Reader()
    out = ReadingProcessor(reader, memory=False, row=2).attend(query, key, value)
    torch.testing.assert_close(out.double(), naive(query, key, value), rtol=1e-5, atol=1e-6)
    assert torch.equal(reader.seen[0][1], key[2:3])
    assert reader.seen[0][3] == 1
