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
    assert set(thorough.TESTS[file]) <= there


def test_one_row_of_a_table_is_left_and_what_has_none():
    table = [f"tests/test_a.py::test_table[{row}]" for row in range(5)]
    left = thorough.left_out([*table, "tests/test_a.py::test_alone"])
    assert len(left) == 4
    assert left < set(table)


def test_core_cases_are_left():
    rows = {f"tests/test_a.py::test_all[float32-{case}]" for case in cases.CASES}
    kept = {f"tests/test_a.py::test_all[float32-{case}]" for case in thorough.CORE}
    assert thorough.left_out(rows) == rows - kept
