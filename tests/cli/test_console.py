"""Tests of the console: results on stdout, messages on stderr, no control characters from a user's text."""

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.cli import console

WIDE = ["x" * 60, "1" * 60, "2" * 60]


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", f"from dmquant.cli import console\n{code}"], capture_output=True, **options)


def test_a_piped_table_keeps_every_digit(capsys):
    console.print_table(["name", "a", "b"], [WIDE], align="lrr", notes=["note"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == WIDE
    assert lines[-1] == "note"
    assert all(line == line.rstrip() for line in lines)


def test_text_in_brackets_and_emoji_names_are_not_markup(capsys):
    console.print_table(["[red]name"], [["[weights/unet] :smile:"]], align="l")
    console.print_message("[bold]talk")
    out, err = capsys.readouterr()
    assert "[red]name" in out and "[weights/unet] :smile:" in out
    assert err == "[bold]talk\n"


@given(st.text())
def test_clean_text_has_no_control_characters(text):
    assert not [char for char in console.clean(text) if (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160]


def test_escape_sequences_reach_neither_stream(capsys):
    console.print_table(["name"], [["\x1b[31mred\x07"]], align="l")
    console.print_error("bad \x1b]0;title\x07 name")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out + err


def test_an_error_is_one_line(capsys):
    console.print_error("first\nsecond   third")
    assert capsys.readouterr().err == "error: first second third\n"


def test_messages_are_not_wrapped_when_piped(capsys):
    console.print_message("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_is_printed_in_a_locale_without_arrows():
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("console.print_table(['FID ↓', 'n ↑'], [['–', 'é']], align='lr')", env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"FID v" in done.stdout and b"n ^" in done.stdout and b"-" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_the_rule_of_a_table_is_printed_in_every_encoding(encoding):
    done = run("console.print_table(['ab'], [['cd']], align='l')", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert b"?" not in done.stdout and b"--" in done.stdout, done


def test_control_characters_are_removed_from_results(capsys):
    console.print_result("a\x1b[31mb\tc\nd\x07\n")
    assert capsys.readouterr().out == "a[31mb\tc\nd\n"


def test_closed_streams_are_no_error():
    code = "import sys\nsys.stdout = sys.stderr = None\nconsole.print_result('x')\nconsole.print_message('x')\n"
    code += "console.print_table(['a'], [['b']], align='l')\nassert list(console.Tracker(period_s=0.0)(range(2), 'w')) == [0, 1]"
    assert run(code).returncode == 0


def test_a_closed_pipe_raises_at_the_write_and_not_at_exit():
    code = "import os, sys\nos.close(os.dup2(os.pipe()[1], 1))\ntry:\n console.print_result('x')\nexcept OSError:\n os._exit(7)"
    assert run(code).returncode == 7


def test_tracking_yields_the_items_and_prints_progress_loss_and_time_left(capsys):
    items = [SimpleNamespace(loss=0.5) for _ in range(4)]
    assert list(console.Tracker(period_s=0.0)(items, "train")) == items
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: 1/4, loss 0.5, ") and lines[0].endswith(" left")
    assert lines[-1].startswith("train: done in")


def test_work_of_unknown_length_is_counted(capsys):
    list(console.Tracker(period_s=0.0)((i for i in range(2)), "read"))
    assert capsys.readouterr().err.splitlines()[:2] == ["read: 1", "read: 2"]


def test_short_work_prints_nothing(capsys):
    assert list(console.Tracker()(range(3), "quick")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_bars_also_for_nested_work():
    code = "track = console.Tracker()\nfor _ in track(range(3), 'outer'):\n for _ in track(range(2), 'inner'): pass"
    talk = in_terminal(code)
    assert "outer" in talk and "3/3" in talk


def test_a_narrow_terminal_breaks_numbers_but_drops_no_digit():
    digits = "1234567890" * 4
    shown = in_terminal(f"console.print_table(['n'], [['{digits}']], align='r')", COLUMNS="20")
    assert "".join(filter(str.isdigit, shown)) == digits


def test_a_comparison_that_is_too_wide_has_a_column_per_model():
    code = """
from dmquant.evaluation.reports.comparison import Column, Comparison
columns = [Column('model', 'model'), *(Column(f'm{i}', f'metric number {i}') for i in range(9))]
row = {column.key: f'{column.key}-value' for column in columns}
console.print_comparison(Comparison(tuple(columns), (row,), ('the note',)))
"""
    wide, narrow = in_terminal(code, COLUMNS="250"), in_terminal(code, COLUMNS="60")
    assert len(wide.splitlines()) == 5 and len(narrow.splitlines()) == 13
    assert all(f"metric number {i}" in narrow and f"m{i}-value" in narrow for i in range(9))


def test_an_error_ends_the_bars_and_is_alone_on_the_last_line():
    code = """
from dmquant.cli import exit_codes
from dmquant.errors import DmquantError
def work():
    for _ in console.Tracker()(range(3), 'training'):
        raise DmquantError('diverged')
try:
    work()
except DmquantError as error:
    exit_codes.report_error(error)
"""
    assert in_terminal(code).splitlines()[-1].endswith("error: diverged")


def test_no_color_and_dumb_terminals_get_no_colour():
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code = "console.print_error('x'); console.print_table(['a'], [['b']], align='l')"
        assert "\x1b[3" not in in_terminal(code, **environment)


def in_terminal(code: str, **environment: str) -> str:
    """Returns the output of a program on a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", f"from dmquant.cli import console\n{code}"]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env={**os.environ, "COLUMNS": "80", **environment})
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 65536):
            text += chunk
    except OSError:  # Linux reports the closed end of a terminal as an I/O error
        pass
    os.close(leader)
    assert process.wait() == 0, text
    return text.decode()


def test_an_interrupted_loop_restores_the_terminal():
    with pytest.raises(KeyboardInterrupt):
        for _ in console.Tracker()(range(3), "work"):
            raise KeyboardInterrupt


def test_warnings_are_one_line_on_stderr():
    done = run("import warnings\nconsole.show_warnings()\nwarnings.warn('a setting\\nis ignored')", text=True)
    assert done.stderr == "warning: a setting is ignored\n"
