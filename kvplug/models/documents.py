"""Needle prompts: a password in a haystack of sentences, of an exact number of tokens.

Every sentence is made of words that are one token each, so lengths are known without tokenizing;
the finished prompt is tokenized once, to be sure. All haystack is in the past tense: the word "is",
with which a needle's key ends, stands in needles alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvplug.models.words import all_words, word_sections

# Sections of words.txt by first letter; everything else stands for itself.
_SECTIONS = {
    "A": "adjectives",
    "D": "adverbs",
    "I": "intransitive verbs",
    "M": "names",
    "N": "nouns",
    "V": "transitive verbs",
}
# The prepositions that read well with any noun.
_PLACING = ("near", "beside", "behind", "beyond", "above", "below", "under", "around", "toward")
_PATTERNS = tuple(
    pattern.split()
    for pattern in (
        "the A N V the A N P the N .",
        "M V the A N and I D .",
        "D the N I P the A N .",
        "the N and the A N V M P the N .",
        "M I D while the A N V the N .",
        "P the A N , the N V one A N .",
        "the A A N I D .",
        "M and M V the N P the A N .",
    )
)
_SHORTEST = 4  # of a filling sentence: "the N I ."
_ROOM = 24  # tokens left at which the filling sentence closes the document; over any pattern's


@dataclass(frozen=True)
class NeedlePrompt:
    """A document with one answer to find, and the chat that asks for it.

    Attributes:
        document: Haystack and needles.
        question: Asks for one needle, "What is the password of the old lighthouse?".
        expected: What the recall model says, "crimson harbor seven.", then ends its turn.
        token_ids: The whole chat-templated prompt with its generation prompt.
    """

    document: str
    question: str
    expected: str
    token_ids: list[int]

    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages; rendered, they are `token_ids`."""
        return _messages(self.document, self.question)


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    depth: float,
    seed: int,
    needles: int = 1,
) -> NeedlePrompt:
    """Hides needles in a haystack and asks for the first.

    Args:
        tokenizer: The bundled models' tokenizer.
        context_tokens: Length of the whole prompt, exactly.
        depth: Where the asked needle stands: 0.0 opens the document, 1.0 closes it.
        seed: Same seed, same prompt.
        needles: How many there are; the others stand evenly spread and differ in place and answer.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; it must be between 0.0 and 1.0")
    depths = [depth, *((i + 0.5) / (needles - 1) for i in range(needles - 1))]
    document, keys, answers = _hide(tokenizer, context_tokens, depths, seed)
    question = f"What is {keys[0]}?"
    token_ids = _render(tokenizer, document, question)
    if len(token_ids) != context_tokens:
        raise AssertionError(f"{len(token_ids)} tokens instead of {context_tokens}")
    return NeedlePrompt(document, question, f"{answers[0]}.", token_ids)


def needle_questions(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, needles: int, seed: int
) -> list[NeedlePrompt]:
    """Hides needles evenly over one document and asks for each: prompts that share a prefix.

    Args:
        tokenizer: The bundled models' tokenizer.
        context_tokens: Length of every prompt, exactly.
        needles: How many there are.
        seed: Same seed, same prompts.
    """
    depths = [(i + 0.5) / needles for i in range(needles)]
    document, keys, answers = _hide(tokenizer, context_tokens, depths, seed)
    questions = [f"What is {key}?" for key in keys]
    first = _render(tokenizer, document, questions[0])
    # The document is tokenized once: what follows it is the same after an empty one.
    bare = [_render(tokenizer, "", question) for question in questions]
    opening = next(i for i, (a, b) in enumerate(zip(bare[0], first, strict=False)) if a != b)
    shared = first[: len(first) - (len(bare[0]) - opening)]
    return [
        NeedlePrompt(document, question, f"{answer}.", shared + ids[opening:])
        for question, answer, ids in zip(questions, answers, bare, strict=True)
    ]


def _hide(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, depths: list[float], seed: int
) -> tuple[str, list[str], list[str]]:
    """A document with one needle at each depth, their keys and answers.

    The document is of the length at which a prompt that asks for one key has `context_tokens`.
    """
    draw = random.Random(f"{seed} {len(depths)}")
    keys, answers = _draw_needles(draw, len(depths))
    hidden = [
        [*key.split(), "is", *answer.split(), "."]
        for key, answer in zip(keys, answers, strict=True)
    ]
    frame = len(_render(tokenizer, "", f"What is {keys[0]}?"))
    room = context_tokens - frame - sum(map(len, hidden))
    if room < _ROOM:
        least = context_tokens - room + _ROOM
        raise ValueError(f"{len(depths)} needles need {least} tokens or more")
    sentences = _insert(_haystack(draw, room), hidden, depths, room)
    return _write(sentences), keys, answers


def random_tokens(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[int]:
    """`length` token ids drawn evenly from the words: no specials, no punctuation, no pieces."""
    ids = tokenizer.convert_tokens_to_ids(all_words())
    return random.Random(seed).choices(ids, k=length)


def _messages(document: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def _render(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        _messages(document, question), tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _draw_needles(draw: random.Random, count: int) -> tuple[list[str], list[str]]:
    """Keys like "the password of the old lighthouse" and three-word answers, all different."""
    words = word_sections()
    places = [f"{a} {p}" for a in words["adjectives"][:60] for p in words["places"]]
    if count > len(places):
        raise ValueError(f"{count} needles, but there are only {len(places)} places")
    keys = [
        f"the {draw.choice(words['attributes'])} of the {place}"
        for place in draw.sample(places, count)
    ]
    answers: dict[str, None] = {}
    while len(answers) < count:
        sections = ("colors", "places", "numbers")
        answers[" ".join(draw.choice(words[section]) for section in sections)] = None
    return keys, list(answers)


def sentence(draw: random.Random) -> str:
    """One sentence of the haystack."""
    return _write([_draw_sentence(draw, _pattern_words())])


def _pattern_words() -> dict[str, Sequence[str]]:
    """What stands for each letter of a pattern."""
    words = {letter: word_sections()[section] for letter, section in _SECTIONS.items()}
    return {**words, "P": _PLACING}


def _draw_sentence(draw: random.Random, words: dict[str, Sequence[str]]) -> list[str]:
    """Tokens of a sentence."""
    pattern = draw.choice(_PATTERNS)
    return [draw.choice(words[s]) if s in words else s for s in pattern]


def _haystack(draw: random.Random, tokens: int) -> list[list[str]]:
    """Sentences, as lists of tokens, that are `tokens` long together (none for 0)."""
    words = _pattern_words()
    sentences = []
    left = tokens
    while left > _ROOM:
        sentences.append(_draw_sentence(draw, words))
        left -= len(sentences[-1])
    if left:
        adjectives = [draw.choice(words["A"]) for _ in range(left - _SHORTEST)]
        noun, verb = draw.choice(words["N"]), draw.choice(words["I"])
        sentences.append(["the", *adjectives, noun, verb, "."])
    return sentences


def _insert(
    sentences: list[list[str]], hidden: list[list[str]], depths: list[float], tokens: int
) -> list[list[str]]:
    """Puts each needle before the sentence where its share of the haystack's tokens is reached."""
    order = sorted(range(len(hidden)), key=lambda i: depths[i])
    result: list[list[str]] = []
    passed = 0
    for sentence in sentences:
        while order and depths[order[0]] * tokens <= passed:
            result.append(hidden[order.pop(0)])
        result.append(sentence)
        passed += len(sentence)
    return result + [hidden[i] for i in order]


def _write(sentences: list[list[str]]) -> str:
    """Text of the sentences: names and first words in capitals, no space before punctuation."""
    capitals = {name: name.capitalize() for name in word_sections()["names"]}
    written = []
    for sentence in sentences:
        text = (
            " ".join([capitals.get(word, word) for word in sentence])
            .replace(" ,", ",")
            .replace(" .", ".")
        )
        written.append(text[0].upper() + text[1:])
    return " ".join(written)
