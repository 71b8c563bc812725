import subprocess
import sys
import textwrap

import pytest

from alignprop_jax.errors import UserError

PROGRAM = """
    import sys
    from absl import flags
    from alignprop_jax.errors import UserError, run_program

    flags.DEFINE_integer("count", 1, "a number")
    flags.DEFINE_string("fail", None, "what goes wrong")

    def main(argv):
        if flags.FLAGS.fail == "user":
            raise UserError("culprit;\\n   cure")
        if flags.FLAGS.fail == "interrupt":
            raise KeyboardInterrupt
        if flags.FLAGS.fail == "defect":
            raise ValueError("a defect")
        print("ran")

    run_program(main)
"""


def run(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "message, line",
    [
        ("culprit;\n   cure", "culprit; cure"),
        ("a\0b\x1b[31m", "a\\x00b\\x1b[31m"),
        ("lone \ud800", "lone \\ud800"),
        ("Käfer\u2028cure", "Käfer cure"),
    ],
)
def test_an_error_is_a_line_that_can_be_printed(message, line):
    assert str(UserError(message)) == line


def test_an_error_that_quotes_much_keeps_its_culprit_and_its_cure():
    line = str(UserError(f"culprit {'x' * 100_000} cure"))
    assert len(line) <= 1000 and line.startswith("culprit xxx") and line.endswith("xxx cure")


@pytest.mark.parametrize(
    "argument, status, line",
    [
        ("--fail=user", 1, "error: culprit; cure"),
        ("--fail=interrupt", 130, "interrupted"),
        ("--count=many", 2, "error: flag --count=many: "),
        ("--no_such_flag", 2, "error: Unknown command line flag 'no_such_flag'"),
        ("stray", 2, "error: unexpected argument 'stray'"),
        (f"--{'x' * 10_000}=1", 2, "error: the name of a flag is too long to be one"),
    ],
)
def test_bad_input_is_one_line(argument, status, line):
    result = run(argument)
    assert result.returncode == status
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_flag_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "flags").write_bytes(b"--count=2\xff")
    result = run(f"--flagfile={tmp_path / 'flags'}")
    assert result.returncode == 2
    assert result.stderr == (
        "error: the file of --flagfile is not UTF-8 text (invalid start byte)\n"
    )


def test_a_flag_file_whose_name_is_none_is_one_line(tmp_path):
    (tmp_path / "flags").write_bytes(b"--flagfile=a\0b")
    result = run(f"--flagfile={tmp_path / 'flags'}")
    assert result.returncode == 2
    assert result.stderr == ("error: what --flagfile names cannot be opened (embedded null byte)\n")


def test_a_good_run_prints_only_its_own_lines():
    result = run("--count=2")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran\n", "")


def test_a_defect_keeps_its_traceback():
    result = run("--fail=defect")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ValueError: a defect" in result.stderr


def test_a_note_is_one_line_said_once(capsys):
    from alignprop_jax.errors import note

    for _ in range(2):
        note("the prompt\n  was cut")
    assert capsys.readouterr().out == "note: the prompt was cut\n"
