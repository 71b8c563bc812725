import json

import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.foreign_json import (
    boolean,
    either,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    read_fields,
    read_json_object,
    section,
    text,
)

FIELDS = {
    "integer": (integer(1, 8), [1, 8], [0, 9, 1.0, True, "1", None, [1], {}]),
    "number": (
        number(0, 2),
        [0, 2.0, 0.5],
        [-1, 2.1, float("nan"), float("inf"), True, "1", 10**400],
    ),
    "boolean": (boolean(), [True, False], [0, 1, "true", None]),
    "text": (text(most=3), ["", "abc"], ["abcd", 1, None, ["a"]]),
    "one_of": (one_of("a", 1, None), ["a", 1, None], ["b", True, 1.0, [], {}]),
    "list_of": (
        list_of(integer(1, 8), 1, 2),
        [(1,), (1, 2)],
        [[], [1, 2, 3], [0], ["1"], 1, "12", {"1": 1}],
    ),
    "mapping_of": (mapping_of(integer(1, 8), 1), [{}, {"a": 1}], [{"a": 0}, {"a": 1, "b": 1}, [1]]),
    "section": (section(), [{}, {"a": 1}], [[], 1, None, "a"]),
    "either": (either(integer(1, 8), boolean()), [1, True], [0, "1", None]),
    "optional": (optional(integer(1, 8)), [None, 1], [0, "1"]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_what_it_allows(name):
    field, good, _ = FIELDS[name]
    for value in good:
        assert read_fields({"key": value}, {"key": field}) == {"key": value}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_refuses_the_rest_by_key_value_and_what_is_allowed(name):
    field, _, bad = FIELDS[name]
    for value in bad:
        with pytest.raises(UserError) as caught:
            read_fields({"key": value}, {"key": field}, "section.")
        message = str(caught.value)
        assert message.startswith("section.key=") and message.endswith(field.allowed)
        assert len(message) < 300


def test_a_key_that_is_absent_has_the_default_or_is_missed():
    assert read_fields({"other": 1}, {"key": integer(1, 8, default=4)}) == {"key": 4}
    with pytest.raises(UserError, match="lacks the key key, which is a whole number from 1 to 8"):
        read_fields({"other": 1}, {"key": integer(1, 8)})


def test_null_stands_for_the_default_where_it_is_allowed():
    schema = {"key": optional(integer(1, 8, default=4))}
    assert read_fields({"key": None}, schema) == read_fields({}, schema) == {"key": 4}


def test_numbers_are_floats():
    assert type(read_fields({"key": 1}, {"key": number(0, 2)})["key"]) is float


def test_a_file_is_read_with_or_without_a_mark(tmp_path):
    path = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps({"key": "é"}), encoding=encoding)
        assert read_json_object(path) == {"key": "é"}


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"3", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "number", "cut", "bytes", "deep", "digits"],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="config.json: (cannot be read|holds)"):
        read_json_object(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match="larger than 64 MiB"):
        read_json_object(path)


def test_a_file_that_is_absent_or_a_folder_is_refused_by_name(tmp_path):
    for path, message in (
        (tmp_path / "absent.json", "absent.json: no such file"),
        (tmp_path, "a file belongs here, and this is none"),
    ):
        with pytest.raises(UserError, match=message):
            read_json_object(path)
