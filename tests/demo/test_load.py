"""A short version of `python -m tests.load`: a few visitors, each of whom does everything that visitors do."""

import asyncio
from collections import Counter

import pytest

from tests.demo.conftest import served
from tests.load.__main__ import report, unfairness, visit
from tests.load.server import Use
from tests.load.visitors import MIXED, Findings, Wait, check

NUM_VISITORS = 4


@pytest.fixture(scope="module")
def page(colour_model):
    with served(colour_model) as page:
        yield page


@pytest.fixture(scope="module")
def findings(page):
    # No time: how much is done must not depend on how fast the machine is.
    findings, _ = asyncio.run(visit(page.url, page.model, NUM_VISITORS, 0, first=[*MIXED]))
    return findings


def test_visitors_get_what_their_seeds_give_alone(findings, page):
    check(page.model, findings)
    assert findings.errors == Counter() and findings.wrong == []
    assert findings.done == Counter(dict.fromkeys(MIXED, NUM_VISITORS))
    assert len(findings.samples) >= 2 * NUM_VISITORS  # of the page and of the endpoint
    assert all(0 < wait.first <= wait.last for wait in findings.waits)


def test_a_wrong_picture_is_found(findings, page):
    settings, codes, tiles = next(sample for sample in findings.samples if sample[2] is not None)
    other = Findings(samples=[(settings, codes, tiles ^ 64), (settings, [[0] * len(row) for row in codes], tiles)])
    check(page.model, other)
    assert [what.split()[0] for what in other.wrong] == ["pixels", "codes"]


def test_report_says_how_long_visitors_waited():
    waits = [Wait(0, 4, 1.0, 3.0), Wait(0, 4, 1.0, 3.0), Wait(1, 2, 4.0, 6.0)]
    findings = Findings(waits, Counter(generate=3), busy=2)
    assert unfairness(findings) == 2
    lines = report(findings, [], 5.0)
    assert "2.00 a second, in 0.60 generations" in lines and "told that too many" in lines
    assert "first picture   p50 1.00 s, p95 3.70 s, longest 4.00 s" in lines


@pytest.mark.parametrize("seconds, settled", [(1200, 120), (100, 50)])
def test_memory_is_measured_from_when_the_page_has_settled(seconds, settled):
    uses = [(float(t), Use(memory=t << 20, files=9, threads=5, temporary=0)) for t in range(seconds + 1)]
    lines = report(Findings(), uses, float(seconds))
    # The medians of the twenty seconds before.
    assert f"memory      {settled - 10} MiB after {settled} s, {seconds - 10} at the end" in lines
