"""common/file_templates.py: what is filled into a text file stays what it was."""

import pytest
from jinja2 import UndefinedError

from privet.common.file_templates import render, systemd_word


def test_a_systemd_word_is_taken_as_text():
    assert systemd_word('a b%h$HOME"\\') == '"a b%%h$$HOME\\"\\\\"'
    assert systemd_word("$HOME", in_command=False) == '"$HOME"'


def test_a_blank_that_is_left_empty_is_an_error():
    with pytest.raises(UndefinedError, match="port"):
        render("privet.server.operations", "nginx.conf", inner="", ipv6=False, root=False, paths=())
