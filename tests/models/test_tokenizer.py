"""The bundled tokenizer: ASCII in, readable text out, and a template that continues."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvplug.models.tokenizer import SPECIALS, build_tokenizer, save_tokenizer, vocabulary
from kvplug.models.words import all_words

TOKENIZER = build_tokenizer()
ASCII = st.text(st.characters(max_codepoint=127), max_size=200)


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@given(ASCII)
def test_any_ascii_text_survives(text: str) -> None:
    assume(not any(special in text for special in SPECIALS))
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.unk_token_id not in ids
    decoded = decode(TOKENIZER, ids)
    assert TOKENIZER(decoded)["input_ids"] == ids
    # Only white space, capitals and control characters are lost.
    printable = "".join(c for c in text.lower() if "!" <= c <= "~")
    assert decoded.replace(" ", "") == printable


def test_words_are_single_tokens() -> None:
    words = all_words()
    assert len(words) == len(set(words))
    ids = TOKENIZER(" ".join(words), add_special_tokens=False)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == words


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        (
            "The password of the old lighthouse is crimson harbor seven.",
            "the password of the old lighthouse is crimson harbor seven.",
        ),
        ("Well, it's 1024 tokens: don't ask!", "well, it's 1024 tokens: don't ask!"),
        ("xyzzy\n\tplugh?", "xyzzy plugh?"),
        ("a" * 65, "a" * 64 + " a"),
    ],
    ids=["needle", "punctuation", "spelled", "long"],
)
def test_decoding_reads_as_text(text: str, decoded: str) -> None:
    assert decode(TOKENIZER, TOKENIZER(text)["input_ids"]) == decoded


def test_what_is_saved_loads_the_same(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
    assert loaded.chat_template == TOKENIZER.chat_template
    text = "It's a test, isn't it?"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_each_token_decodes_alone_as_streaming_needs() -> None:
    ids = TOKENIZER("the keeper's dog, xyzzy, slept.")["input_ids"]
    parts = [decode(TOKENIZER, [ids[1], i])[len("the") :] for i in ids[2:]]
    assert "the" + "".join(parts) == "the keeper's dog, xyzzy, slept."


def render(messages: list[dict[str, object]], **options: bool) -> str:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("user", "prompt"),
    [
        ("Hello.", ""),
        ("What is the code?", "the code is"),
        ("So.\nWhat IS the old Code? Please.", "the old code is"),
        ("What is a? What is the code?", "the code is"),
        ("What is the code? What is", "the code is"),
        ("What is it", ""),
        ("", ""),
    ],
)
def test_generation_prompt_starts_the_answer(user: str, prompt: str) -> None:
    text = render([{"role": "user", "content": user}], add_generation_prompt=True)
    assert text == f"<|begin|><|user|>{user}<|end|><|assistant|>{prompt}"


def test_last_user_message_counts() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the code?"},
        {"role": "assistant", "content": "red seven."},
        {"role": "user", "content": "Thanks."},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<|begin|><|system|>Be brief.<|end|><|user|>What is the code?<|end|>"
        "<|assistant|>red seven.<|end|><|user|>Thanks.<|end|><|assistant|>"
    )


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Long. "}, {"type": "text", "text": "What is the code?"}]
    text = render([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert text == "<|begin|><|user|>Long. What is the code?<|end|><|assistant|>the code is"


def test_final_message_can_be_continued() -> None:
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Tell me."},
        {"role": "assistant", "content": "The code is"},
    ]
    text = render(messages, continue_final_message=True)
    assert text == "<|begin|><|user|>Tell me.<|end|><|assistant|>The code is"
