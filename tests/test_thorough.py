"""What `make test` leaves out is there to be left out."""

import pathlib
import re

import cases
import pytest
import thorough

TESTS = pathlib.Path(__file__).parent


def test_rows_of_the_tables_are_cases():
    assert thorough.CORE < cases.CASES.keys()


@pytest.mark.parametrize("file", thorough.TESTS)
def test_tests_that_are_left_out_are_there(file):
    source = (TESTS / file).read_text()
    there = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    assert {name.partition("[")[0] for name in thorough.TESTS[file]} <= there
