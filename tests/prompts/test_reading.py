import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.prompts.reading import load_prompts


def test_built_in_list():
    assert load_prompts("animals_unseen") == [
        "a snail",
        "a hippopotamus",
        "a cheetah",
        "a crocodile",
        "a lobster",
        "an octopus",
    ]


def test_a_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a red fox \n\nzwei Bären\r\n", encoding="utf-8")
    assert load_prompts(str(path)) == ["a red fox", "zwei Bären"]


def test_a_file_that_is_absent_empty_or_not_text(tmp_path):
    with pytest.raises(UserError, match="'none.txt' cannot be read .No such file.*animals"):
        load_prompts("none.txt")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        load_prompts(str(tmp_path))
    path = tmp_path / "prompts.txt"
    path.write_text(" \n\n")
    with pytest.raises(UserError, match="prompts.txt' is empty; write one prompt a line"):
        load_prompts(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_prompts(str(path))
