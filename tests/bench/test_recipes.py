"""Rows of the recipes table: labels, options on the command line, which budgets differ."""

from __future__ import annotations

import pytest

from kvplug.bench import recipes
from kvplug.bench.recipes import Recipe, all_recipes, chosen_recipes, parse_recipe
from kvplug.errors import KvplugError
from kvplug.policies import POLICIES

WIDE = Recipe("quest-wide", {"policy": "quest", "local": 1024}, "Why.")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One configuration in the list."""
    monkeypatch.setattr(recipes, "CONFIGURATIONS", (WIDE,))


def test_every_registered_recipe_has_a_row() -> None:
    plain = {name: {"policy": name} for name in POLICIES if name != "dense"}
    rows = {label: recipe.options for label, recipe in all_recipes().items()}
    assert plain.items() <= rows.items()
    assert "dense" not in rows


@pytest.mark.parametrize("recipe", all_recipes().values(), ids=lambda recipe: recipe.label)
def test_the_default_table_can_be_measured(recipe: Recipe) -> None:
    for budget in (256, 512, 2048):
        assert recipe.config(budget, 32).budget == budget
    assert recipe.options.keys() == {"policy"} or recipe.why.endswith(".")


def test_labels_are_unique() -> None:
    """A configuration called like a recipe would hide it."""
    labels = [recipe.label for recipe in recipes.CONFIGURATIONS]
    assert len({*labels, *POLICIES}) == len(labels) + len(list(POLICIES))


@pytest.mark.usefixtures("named")
def test_chosen_rows() -> None:
    written = ['mine={"policy": "simhash", "options": {"last": 2}}']
    chosen = chosen_recipes("quest-wide, simhash,dense,simhash", written)
    assert [(recipe.label, recipe.policy) for recipe in chosen] == [
        ("quest-wide", "quest"), ("simhash", "simhash"), ("mine", "simhash"),
    ]  # fmt: skip
    assert chosen[2].options["options"] == {"last": 2}
    everything = chosen_recipes("all", written)
    labels = [recipe.label for recipe in everything]
    assert labels.index("quest-wide") == labels.index("quest") + 1
    assert [recipe.label for recipe in everything] == [*all_recipes(), "mine"]
    assert chosen_recipes("", ()) == []


def test_the_label_names_the_policy() -> None:
    assert parse_recipe('quest={"local": 64}') == Recipe("quest", {"policy": "quest", "local": 64})


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("names", "written", "sentence"),
    [
        ("simhsh", [], "Unknown policy 'simhsh': did you mean 'simhash'?"),
        ("quest-wid", [], "did you mean 'quest-wide'?"),
        ("all", ["quest"], "must be LABEL=OPTIONS"),
        ("all", ['a b={"policy": "quest"}'], "must be LABEL=OPTIONS"),
        ("all", ['a,b={"policy": "quest"}'], "must be LABEL=OPTIONS"),
        ("all", ['={"policy": "quest"}'], "must be LABEL=OPTIONS"),
        ("all", ["mine=quest"], "--recipe mine must be a JSON object"),
        ("all", ['mine={"policy": "quest", "budget": 64}'], "use --budgets"),
        ("all", ['mine={"policy": "dense"}'], "is measured in any case"),
        ("all", ['quest={"local": 64}'], "the name is taken"),
        ("", ['quest-wide={"policy": "quest"}'], "the name is taken"),
        ("", ['m={"policy": "quest"}', 'm={"policy": "simhash"}'], "the name is taken"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(names: str, written: list[str], sentence: str) -> None:
    with pytest.raises(KvplugError) as caught:
        chosen_recipes(names, written)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".") or "valid names" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "budget", "sentence"),
    [
        ({"policy": "simhsh"}, 64, "did you mean 'simhash'"),
        ({"policy": "simhash", "options": {"lst": 1}}, 64, "did you mean 'last'"),
        ({"policy": "quest", "lcal": 1}, 64, "did you mean 'local'"),
        ({"policy": "quest"}, 7, "at least one page of 32 tokens"),
        ({"policy": "quest", "window": 40}, 64, "multiple of the page size 32"),
    ],
)
def test_options_are_checked(options: dict[str, object], budget: int, sentence: str) -> None:
    with pytest.raises(KvplugError, match=sentence):
        Recipe("mine", options).config(budget, 32)


def test_which_recipes_heed_the_budget() -> None:
    quest, streaming = Recipe("q", {"policy": "quest"}), Recipe("s", {"policy": "streaming"})
    assert quest.heeds([256, 512], 32)
    assert not streaming.heeds([256, 512, 2048], 32)
    # One budget is that budget, and two within the same page are the same.
    assert streaming.heeds([256], 32)
    assert not quest.heeds([256, 260], 32)
