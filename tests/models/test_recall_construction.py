"""The formulas behind the recall model: codes, the position heads' leak, and a repeatable build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvplug.models import cache, recall
from kvplug.models.codes import COUNT, SUBCODE_DISTANCE, SUBCODES, token_codes
from kvplug.models.tokenizer import vocabulary

LONGEST = 1_100_000
LEAK = 1e-3


def inverse_frequencies() -> torch.Tensor:
    """As vLLM and transformers compute them, in float32."""
    return 1 / (1e15 ** (torch.arange(0, recall.HEAD_DIM, 2).float() / recall.HEAD_DIM))


def rotate(vector: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """RoPE on one constant vector, every step rounded to `dtype`: `[T, 128]`."""
    angles = positions[:, None].float() * inverse_frequencies()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = vector.to(dtype).chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@pytest.mark.parametrize("lag", range(1, recall.LAGS + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_beside_the_lag_get_almost_no_attention(lag: int, dtype: torch.dtype) -> None:
    last = LONGEST - 1
    query = rotate(recall.lag_vector(lag), torch.tensor([last]), dtype)[0].float()
    logits = []
    for start in range(0, LONGEST, 100_000):
        positions = torch.arange(start, min(start + 100_000, LONGEST))
        keys = rotate(recall.lag_vector(0), positions, dtype)
        logits.append(keys.float() @ query / recall.HEAD_DIM**0.5)
    odds = (torch.cat(logits) - logits[-1][-1 - lag]).double().exp()
    odds[last - lag] = 0
    assert odds.sum() < LEAK


def test_content_pairs_hardly_turn() -> None:
    angles = LONGEST * inverse_frequencies()[recall.FIRST_CONTENT_PAIR :]
    assert angles.max() < 0.302
    assert len(angles) * 2 == recall.LAGS * len(SUBCODES[0])


def test_codes_overlap_by_a_quarter_at_most() -> None:
    codes = token_codes(COUNT)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    # The bits of codes are a linear space: overlaps with code 0 are all overlaps.
    assert (codes[1:] @ codes[0]).abs().max() == 16


@pytest.mark.parametrize("columns", SUBCODES, ids=range(len(SUBCODES)))
def test_compared_columns_tell_all_codes_apart(columns: tuple[int, ...]) -> None:
    codes = token_codes(COUNT)[:, list(columns)]
    assert len(set(columns)) == 18
    assert (codes[1:] != codes[0]).sum(dim=1).min() == SUBCODE_DISTANCE


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="only 4096 codes"):
        token_codes(COUNT + 1)


def test_two_builds_are_equal_and_small(tmp_path: Path) -> None:
    folders = [recall.build_recall_model(tmp_path / name) for name in ("a", "b")]
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == sorted(path.name for path in folders[1].iterdir())
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert (folders[0] / "model.safetensors").stat().st_size <= 16e6
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_cache_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_CACHE", str(tmp_path))
    path = recall.recall_model_path()
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert recall.recall_model_path() == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_CACHE", str(tmp_path))

    def build(directory: Path) -> Path:
        (directory / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.cached_model("broken", build)
    assert not list(cache.cache_root().iterdir())
