"""The feature table: what it says of our families is so, and every "yes" leads to a test that exists."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import feature_table
from benchmarks.feature_checks import CHECKS, MORE, RESULTS, examine
from benchmarks.features.models import SUBJECTS

ROOT = Path(__file__).parents[1]
MEASURED = json.loads(RESULTS.read_text())
OURS = [subject for subject in SUBJECTS.values() if subject.ours]
# Seconds each. Every run has the same for the same families in tests/test_matrix_compile.py (SEA's export is here alone).
TRACING = ("compiled_prefill", "compiled_decode", "exported_fixed", "exported_dynamic")
CASES = [
    pytest.param(
        subject,
        check,
        id=f"{subject.name.lower().replace(' ', '-')}-{check}",
        marks=[pytest.mark.slow] * (check in TRACING and (subject.name, check) != ("SEA", "exported_dynamic")),
    )
    for subject in OURS
    for check in (*CHECKS, *MORE)
    if MEASURED[subject.name]["checks"][check]["passed"] is not None
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "check"), CASES)
def test_check(subject, check):
    """The check gives now what the table says."""
    found = examine(subject, [check])[check]
    assert found["passed"] == MEASURED[subject.name]["checks"][check]["passed"], found["reason"]


def test_tables_are_up_to_date(collected_ids, monkeypatch):
    """README and page are what the command writes: every yes has a test that pytest collects for that family."""
    named = {test for rows in feature_table.GROUPS.values() for row in rows for test in row.tests}
    found = feature_table.by_test(collected_ids)
    if named <= set(found):  # otherwise a part of tests/ is being run, and the command asks pytest itself
        monkeypatch.setattr(feature_table, "collected", lambda: found)
    assert feature_table.main(["--check"]) == 0


def test_every_yes_of_ours_links_to_a_test():
    """In the README: the file exists and has the test."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index(feature_table.BEGIN) : text.index(feature_table.END)]
    links = set(re.findall(r"\[yes\]\(([^)#]+)#([^)]+)\)", section))
    assert len(links) > 50
    for file, test in links:
        assert f"def {test.rpartition('::')[2]}(" in (ROOT / file).read_text(), (file, test)
    bare = [line for line in section.splitlines() if line.startswith("| ") and re.match(r"\|[^|]*\| yes ", line)]
    assert not bare, "a yes of ours without a link"


def test_every_no_of_ours_says_why():
    """Each number in a cell stands in the list below the tables."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index(feature_table.BEGIN) : text.index(feature_table.END)]
    used = {int(number) for number in re.findall(r"\| no \((\d+)\)", section)}
    listed = {int(number) for number in re.findall(r"^(\d+)\. \S", section, flags=re.M)}
    assert used == listed
    assert used


def test_the_31_checks():
    """As many as the table says."""
    assert len(CHECKS) == 31
