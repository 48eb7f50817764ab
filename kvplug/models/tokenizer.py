"""The bundled models' tokenizer: a common English word is one token, other ASCII text is spelled.

Text is lower-cased and cut into words and single punctuation marks; digits count as letters. A word
outside `words.txt` falls back to WordPiece: the longest known beginning, then `##` pieces down to
single characters; so no ASCII text gives `<unk>`. White space only separates words and is not kept.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from kvplug.models.template import CHAT_TEMPLATE
from kvplug.models.words import all_words

PAD, UNKNOWN, BEGIN, END = "<|pad|>", "<unk>", "<|begin|>", "<|end|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
SPECIALS = (PAD, UNKNOWN, BEGIN, END, *ROLES)

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'ll", "'d", "'m")
_SUFFIXES = ("ed", "er", "est", "ing", "ly", "es", "ness", "less", "ful", "ment", "able", "tion")
_PIECE = r"'(?:s|t|re|ve|ll|d|m)(?![a-z0-9])|[a-z0-9]+|[^a-z0-9\s]"
# WordPiece looks for the longest piece, at quadratic cost: longer words are cut here.
_LONGEST = 64
_GLUED_LEFT = r"^ (?=[.,;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m)$)"
_MULTIPLE = 64  # vLLM pads the vocabulary to this


def vocabulary() -> list[str]:
    """All tokens by id; the last ones are reserved and fill up to a multiple of 64.

    The list is the same on every call and machine.
    """
    characters = [*string.punctuation, *string.ascii_lowercase, *string.digits]
    pieces = [f"##{c}" for c in (*string.ascii_lowercase, *string.digits, *_SUFFIXES)]
    tokens = [*SPECIALS, *characters, *_CONTRACTIONS, *all_words(), *pieces]
    tokens = list(dict.fromkeys(tokens))
    reserved = -len(tokens) % _MULTIPLE
    return tokens + [f"<|reserved_{i}|>" for i in range(reserved)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, in memory; `save_pretrained` of it writes what vLLM and transformers load."""
    tokens = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(
        models.WordPiece(
            ids,
            unk_token=UNKNOWN,
            continuing_subword_prefix="##",
            max_input_chars_per_word=_LONGEST,
        )
    )
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=True, lowercase=True
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.Split(Regex(f"[a-z0-9]{{{_LONGEST}}}"), "isolated"),
        ]
    )
    # Each token's text depends on the token alone, which is what streaming decoders rely on.
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Replace(Regex(_GLUED_LEFT), ""),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    reserved = [token for token in tokens if token.startswith("<|reserved")]
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*SPECIALS, *reserved)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1_100_000,
    )


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes the tokenizer and its chat template into `directory` and returns it."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    return tokenizer
