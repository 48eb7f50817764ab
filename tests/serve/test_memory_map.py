"""The memory map: a trace read with care, and a page that says what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.serve.memory_map import map_data, read_trace, render, write_map

HEAD = {"kind": "head", "page": 4, "model": "m", "policy": "quest", "budget": 8, "layers": [0, 2]}


class Words:
    """Decodes token n as ``wn``; one word ends scripts."""

    @staticmethod
    def decode(tokens: list[int]) -> str:
        return " ".join("</script><b>" if token == 13 else f"w{token}" for token in tokens)


def window(request: str, layer: int, first: int, end: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "window", "request": request, "layer": layer, "first": first, "end": end,
        "far": [1, 3], "selected": [[1], [2]], "best": [[1], [1]], "captured": [0.9, 0.5],
        "best_captured": [0.9, 0.8], "heavy": [[[1, 0.4]], []], **more,
    }  # fmt: skip


def trace(path: Path, *requests: str, extra: str = "") -> Path:
    """A prompt window and two decoded tokens of each request, in two layers."""
    lines: list[dict[str, Any]] = [HEAD]
    for name in requests:
        lines.append({"kind": "request", "request": name, "tokens": list(range(14))})
        for layer in (0, 2):
            lines.append(window(name, layer, 12, 14))
        for end in (15, 16):
            for layer in (0, 2):
                lines.append(window(name, layer, end - 1, end, token=[end * 10]))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + extra)
    return path


def test_one_request_is_read(tmp_path: Path) -> None:
    path = trace(tmp_path / "t", "cmpl-1-0-ab", "cmpl-2-0-cd", extra='{"kind": "wind')
    found = read_trace(path, "cmpl-2")
    assert found.request == "cmpl-2-0-cd"
    assert found.tokens == list(range(14))
    assert len(found.windows) == 6
    assert {line["request"] for line in found.windows} == {"cmpl-2-0-cd"}
    assert not found.is_cut
    assert read_trace(trace(tmp_path / "u", "a", extra='{"kind":"full"}\n')).is_cut


def test_what_the_page_draws(tmp_path: Path) -> None:
    data = map_data(read_trace(trace(tmp_path / "t", "a")), Words())
    assert data["pages"] == [
        "w0 w1 w2 w3", "w4 w5 w6 w7", "w8 w9 w10 w11", "w12 </script><b> w150 w160",
    ]  # fmt: skip
    assert [(step["end"], step["decoded"]) for step in data["steps"]] == [
        (14, False), (15, True), (16, True),
    ]  # fmt: skip
    assert data["steps"][1]["text"] == "w150"
    assert data["steps"][0]["layers"][2]["selected"] == [[1], [2]]
    assert data["prompt"] == 14


def test_a_document_cannot_break_out(tmp_path: Path) -> None:
    """Nor can the page ask for anything from elsewhere."""
    page = render(map_data(read_trace(trace(tmp_path / "t", "a")), Words()))
    assert page.count("</script>") == 2, "of the data and of the program"
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    text = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(text)["pages"][3].startswith("w12 </script>")


def test_the_page_is_written(tmp_path: Path, recall_tokenizer: str) -> None:
    out = tmp_path / "map.html"
    made = write_map(trace(tmp_path / "t", "a"), out, None, recall_tokenizer)
    assert made == {
        "request": "a", "context_tokens": 16, "steps": 3, "layers": [0, 2], "out": str(out),
    }  # fmt: skip
    assert out.read_text().startswith("<!doctype html>")


@pytest.fixture(scope="module")
def recall_tokenizer() -> str:
    from kvplug.models.recall import recall_model_path

    return str(recall_model_path())


@pytest.mark.parametrize(
    ("text", "request_name", "sentence"),
    [
        ("", None, "first line is not a head"),
        ("a,b\n", None, "not made of JSON lines"),
        ("[1]\n", None, "first line is not a head"),
        (json.dumps(HEAD) + "\n", None, "holds no request"),
    ],
)
def test_what_is_no_trace_is_refused(
    tmp_path: Path, text: str, request_name: str | None, sentence: str
) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(KvplugError, match=sentence):
        read_trace(tmp_path / "t", request_name)


def test_which_request_is_asked(tmp_path: Path) -> None:
    path = trace(tmp_path / "t", "a-1", "a-2", "b")
    for name, sentence in ((None, "3 such requests"), ("a", "2 such"), ("c", "no request 'c'")):
        with pytest.raises(KvplugError, match=sentence):
            read_trace(path, name)
    assert read_trace(path, "b").request == "b"
    with pytest.raises(KvplugError, match="Cannot read"):
        read_trace(tmp_path / "none")


def test_a_missing_tokenizer_or_folder_is_one_sentence(
    tmp_path: Path, recall_tokenizer: str
) -> None:
    path = trace(tmp_path / "t", "a")
    with pytest.raises(KvplugError, match="Cannot load the tokenizer"):
        write_map(path, tmp_path / "map.html", None, str(tmp_path / "nothing"))
    with pytest.raises(KvplugError, match="Cannot write"):
        write_map(path, tmp_path / "no" / "map.html", None, recall_tokenizer)
