"""What spreadsheets would run is text in CSV files, numbers stay numbers, and every text comes back."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spray.csvs import csv_text, guarded, unguarded

FORMULAS = (
    "=1+1", "=cmd|' /C calc'!A0", "+SUM(A1:A9)", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1", "=", "-", "+x.png",
    "'=1", "''@a", "=HYPERLINK(\"http://x\",\"y\")", "\uff1d1+1", "-1|x", "-.5", "+1 2",
)  # fmt: skip
TAME = ("cat.png", "", "a=b", "'quoted'", " =1", "1-2", "-1", "+3.5", "-1e-5", "0012", "a\nb", "😀")


@pytest.mark.parametrize("text", FORMULAS)
def test_what_could_be_a_formula_starts_with_an_apostrophe(text):
    assert guarded(text) == "'" + text
    assert unguarded(guarded(text)) == text


@pytest.mark.parametrize("text", TAME)
def test_other_texts_and_plain_numbers_stay_as_they_are(text):
    assert guarded(text) == unguarded(text) == text


@given(st.text(st.sampled_from("'=+-@\t\r\n1.e a")))
def test_every_text_comes_back(text):
    assert unguarded(guarded(text)) == text


def test_a_table_is_read_back_by_any_reader():
    rows = [[-1, "=a,b", None, -0.25], [2, 'say "x"\udcff', "-7", float("nan")]]
    text = csv_text(["+n", "name", "x", "y"], rows)
    assert text == '\'+n,name,x,y\n-1,"\'=a,b",,-0.25\n2,"say ""x""?",-7,nan\n'
    assert [row[1] for row in csv.reader(io.StringIO(text, newline=""))] == ["name", "'=a,b", 'say "x"?']
