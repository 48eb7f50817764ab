"""Pages are copied to the bit into their slots and nowhere else; keys turn as rotary ones do."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.gather_pages import Rotation, gather_pages, gather_pages_reference
from tests.kernels.accuracy import EPS, assert_accurate

SHAPES = pytest.mark.parametrize(
    ("page", "heads", "dim", "dtype"),
    [
        (16, 1, 64, torch.float8_e4m3fn),
        (32, 3, 80, torch.bfloat16),
        (64, 2, 96, torch.float16),
        (32, 8, 128, torch.bfloat16),
        (128, 4, 256, torch.float32),
    ],
    ids=["p16-d64-fp8", "p32-d80-bf16", "p64-d96-fp16", "p32-d128-bf16", "p128-d256-fp32"],
)
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def some_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits, NaN among them."""
    *others, last = shape
    raw = torch.randint(0, 256, (*others, last * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def store(page: int, heads: int, dim: int, dtype: torch.dtype, pages: int = 5) -> torch.Tensor:
    """``[pages, 2, P, Hk, D]``, a view of memory in the order of vLLM's cache."""
    raw = some_bytes((pages, heads, page, 2 * dim), dtype)
    return raw.unflatten(-1, (2, dim)).permute(0, 3, 2, 1, 4)


def entries_of(rows: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@SHAPES
def test_copies(
    page: int, heads: int, dim: int, dtype: torch.dtype, integer: torch.dtype, device: str
) -> None:
    """An entry that does not count names what does not exist."""
    source = store(page, heads, dim, dtype).to(device)
    last = heads - 1
    rows = [(4, last, 2), (0, 0, 6), (4, 0, 0), (2**30, 2**30, 2**30)]
    entries = entries_of(rows, integer, device)
    num_valid = torch.tensor([3], dtype=torch.int32, device=device)
    found = some_bytes((7, 2, page, dim), dtype).to(device)
    before, expected = found.clone(), found.clone()
    gather_pages(source, entries, num_valid, found)
    gather_pages_reference(source, entries, num_valid, expected)
    found, expected, before = (slots.view(torch.uint8) for slots in (found, expected, before))
    assert torch.equal(found, expected)
    assert torch.equal(found[2, 1].view(dtype).view(torch.uint8), bits(source[4, 1, :, last]))
    assert torch.equal(found[[1, 3, 4, 5]], before[[1, 3, 4, 5]])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes."""
    return tensor.contiguous().view(torch.uint8)


def test_nothing_is_copied_where_nothing_counts(device: str) -> None:
    source = store(16, 1, 64, torch.bfloat16).to(device)
    slots = torch.full((2, 2, 16, 64), 7.0, dtype=torch.bfloat16, device=device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    gather_pages(source, entries_of([(0, 0, 1)], torch.int32, device), none, slots)
    gather_pages(source, torch.empty(0, 3, dtype=torch.int64, device=device), none, slots)
    assert (slots == 7).all()


def test_slots_may_be_strided(device: str) -> None:
    """A slot may have more behind its keys and values."""
    source = store(16, 2, 64, torch.bfloat16).to(device)
    pool = torch.zeros(3, 2 * 16 * 64 + 32, dtype=torch.bfloat16, device=device)
    slots = pool[:, : 2 * 16 * 64].view(3, 2, 16, 64)
    count = torch.ones(1, dtype=torch.int32, device=device)
    gather_pages(source, entries_of([(3, 1, 2)], torch.int32, device), count, slots)
    assert torch.equal(bits(slots[2]), bits(source[3, :, :, 1]))
    assert (pool[:2] == 0).all()
    assert (pool[2, 2 * 16 * 64 :] == 0).all()


def angles(num: int, half: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, half]`` cosines and sines."""
    turns = 100 * torch.randn(num, half, dtype=torch.float64)
    return turns.cos().float().to(device), turns.sin().float().to(device)


@pytest.mark.parametrize("is_neox", [True, False], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("page", "dim", "half", "dtype"),
    [
        (32, 128, 64, torch.bfloat16),
        (16, 80, 40, torch.float16),
        (64, 96, 24, torch.bfloat16),
        (16, 256, 128, torch.float32),
    ],
    ids=["d128-bf16", "d80-fp16", "half of d96-bf16", "d256-fp32"],
)
def test_turned_keys(
    page: int, dim: int, half: int, dtype: torch.dtype, is_neox: bool, device: str
) -> None:
    """As accurate as plain torch; values and what does not turn to the bit."""
    raw = torch.randn(4, 3, page, 2, dim).to(device, dtype)
    source = raw.permute(0, 3, 2, 1, 4)
    entries = entries_of([(2, 1, 4), (0, 2, 1), (0, 0, 0)], torch.int32, device)
    num_valid = torch.tensor([2], dtype=torch.int32, device=device)
    rotation = Rotation(*angles(3, half, device), is_neox)
    found, plain = (torch.full((5, 2, page, dim), 3.0).to(device, dtype) for _ in range(2))
    exact = torch.full((5, 2, page, dim), 3.0, dtype=torch.float64, device=device)
    for gather, slots in (
        (gather_pages, found), (gather_pages_reference, plain), (gather_pages_reference, exact),
    ):  # fmt: skip
        gather(source, entries, num_valid, slots, rotation)
    # Two products and a sum may be rounded one by one or at once.
    assert_accurate(found, plain, exact, 4 * EPS * exact.abs().max().item())
    assert torch.equal(found[:, 1], plain[:, 1])
    assert torch.equal(found[:, 0, :, 2 * half :], plain[:, 0, :, 2 * half :])
    assert (found[[0, 2, 3]] == 3).all()
    kept = found[4, 0].double().norm(dim=-1) / source[2, 0, :, 1].double().norm(dim=-1)
    assert (kept - 1).abs().max() < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("is_neox", [True, False], ids=["halves", "interleaved"])
def test_turning_moves_a_position(is_neox: bool, device: str) -> None:
    """A key embedded at position 900 and turned by -800 is the key embedded at 100."""
    half, page = 32, 16
    frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    plain = torch.randn(page, 2 * half, dtype=torch.float64)

    def embedded(position: int) -> torch.Tensor:
        pairs = plain.view(page, 2, half).transpose(1, 2) if is_neox else plain.view(page, half, 2)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
            torch.ones(half, dtype=torch.float64), position * frequency
        )
        real = torch.view_as_real(turned)
        return (real.transpose(1, 2) if is_neox else real).reshape(page, 2 * half)

    source = torch.zeros(1, 2, page, 1, 2 * half)
    source[0, 0, :, 0] = embedded(900)
    angle = -800 * frequency[None]
    rotation = Rotation(angle.cos().float().to(device), angle.sin().float().to(device), is_neox)
    slots = torch.zeros(1, 2, page, 2 * half, device=device)
    gather_pages(
        source.to(device), entries_of([(0, 0, 0)], torch.int32, device),
        torch.ones(1, dtype=torch.int32, device=device), slots, rotation,
    )  # fmt: skip
    torch.testing.assert_close(slots[0, 0].cpu().double(), embedded(100), rtol=0, atol=16 * EPS)


def test_what_cannot_be_copied_is_refused(device: str) -> None:
    source = store(16, 2, 64, torch.bfloat16).to(device)
    slots = torch.zeros(3, 2, 16, 64, dtype=torch.bfloat16, device=device)
    entries, count = (
        entries_of([(0, 0, 0)], torch.int32, device),
        torch.ones(1, device=device).int(),
    )
    rotation = Rotation(*angles(1, 32, device), True)
    eight = torch.float8_e4m3fn
    odd = torch.zeros(2, 2, 16, 2, 68, dtype=torch.bfloat16, device=device)[..., :64]
    mixed = slots.transpose(1, 2).contiguous().transpose(1, 2)
    wide = Rotation(*angles(1, 33, device), True)
    wrong: list[tuple[str, Given, Rotation | None]] = [
        ("slots must be bfloat16", (source, entries, count, slots.half()), None),
        (r"entries must be int32 or int64 \[n, 3\]", (source, entries[:, :2], count, slots), None),
        (r"num_valid must be int32 \[1\]", (source, entries, count.long(), slots), None),
        ("contiguous but for the first", (source, entries, count, mixed), None),
        ("multiples of 16 bytes", (odd, entries, count, slots), None),
        ("cannot be turned", (source.to(eight), entries, count, slots.to(eight)), rotation),
        (r"rotary_dim / 2 must be 1 to 32, not 33", (source, entries, count, slots), wide),
    ]
    for sentence, given, turn in wrong:
        with pytest.raises(ValueError, match=sentence):
            gather_pages(*given, turn)
