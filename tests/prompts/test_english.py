import pytest

from alignprop_jax.prompts.english import plural, with_article


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cats"),
        ("fox", "foxes"),
        ("ostrich", "ostriches"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("sheep", "sheep"),
        ("wolf", "wolves"),
        ("mouse", "mice"),
        ("red goose", "red geese"),
        ("tropical fish", "tropical fish"),
        ("maple leaf", "maple leaves"),
        ("octopus", "octopuses"),
    ],
)
def test_plural(name, expected):
    assert plural(name) == expected


def test_what_cannot_be_counted_has_no_plural():
    with pytest.raises(ValueError, match="rice"):
        plural("rice")


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("cat", "a cat"),
        ("ant", "an ant"),
        ("unicorn", "a unicorn"),
        ("red ant", "a red ant"),
        ("orange cat", "an orange cat"),
        ("grapes", "some grapes"),
        ("green bubble tea", "some green bubble tea"),
    ],
)
def test_with_article(phrase, expected):
    assert with_article(phrase) == expected
