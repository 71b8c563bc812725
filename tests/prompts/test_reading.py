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


CAT, DOG = "a red cat", "a blue dog"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # As editors on Windows save a text, and such files joined.
        (f"\ufeff{CAT}\r\n{DOG}\r\n", [CAT, DOG]),
        (f"\ufeff{CAT}\n\ufeff{DOG}", [CAT, DOG]),
        (f"\ufeff\ufeff {CAT}", [CAT]),
        (f"{CAT}\r{DOG}\r\r\n", [CAT, DOG]),
        # What else Unicode calls the end of a line is part of a prompt.
        *((f"{CAT}{end}{DOG}\n{DOG}", [f"{CAT}{end}{DOG}", DOG]) for end in "\v\f\x1c\x1d\x1e"),
        *((f"{CAT}{end}{DOG}\n{DOG}", [f"{CAT}{end}{DOG}", DOG]) for end in "\x85\u2028\u2029"),
        (f"\u2028{CAT}\f\n\v\n", [CAT]),
    ],
)
def test_marks_and_ends_of_lines(data, expected, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data.encode())
    assert load_prompts(str(path)) == expected


def test_a_file_that_is_absent_empty_or_not_text(tmp_path):
    with pytest.raises(UserError, match="'none.txt' cannot be read .No such file.*animals"):
        load_prompts("none.txt")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        load_prompts(str(tmp_path))
    path = tmp_path / "prompts.txt"
    path.write_text(" \n\n")
    with pytest.raises(UserError, match="prompts.txt' is empty; write one prompt a line"):
        load_prompts(str(path))
    for data, reason in (
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("\ufeffa cat".encode("utf-16"), "not UTF-8 text at byte 0; save it as UTF-8"),
        (b"a cat\n\xe4", "not UTF-8 text at byte 6"),
        (b"a \0 cat", "a NUL at byte 2"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=reason):
            load_prompts(str(path))
    with pytest.raises(UserError, match="embedded null"):
        load_prompts("a\0b")
    with pytest.raises(UserError, match="larger than 64 MiB"):
        load_prompts("/dev/zero")
