"""The picture of a tree: complete, self-contained, and safe whatever the artefacts say."""

from __future__ import annotations

import html.parser
import json

from stillroom.search import search
from stillroom.search.picture import patch, tree
from tests.search.problems import TASKS, evaluate, modify


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.data, self.open = [], None, {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = (tag, dict(attrs).get("type"))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.data.setdefault(self.inside, []).append(data)


def test_every_agent_is_a_dot_sized_by_its_evaluations_and_the_best_lineage_stands_out():
    found = search(5, modify, evaluate, TASKS, 60, seed=1)
    page = Reader(tree(found.archive, found.best))
    dots = [attrs for tag, attrs in page.tags if tag == "circle"]
    paths = [attrs for tag, attrs in page.tags if tag == "path"]
    agents = found.archive.agents
    assert len(dots) == len(agents)
    assert len(paths) == len(agents) - 1
    line = found.archive.lineage(found.best)
    assert [i for i, dot in enumerate(dots) if dot.get("class") == "best"] == sorted(line)
    assert sum(attrs.get("class") == "best" for attrs in paths) == len(line) - 1
    radius = [float(dot["r"]) for dot in dots]
    tried = [a.passed + a.failed for a in agents]
    assert all(radius[i] > radius[j] for i in range(len(dots)) for j in range(len(dots)) if tried[i] > tried[j])
    places = {(dot["cx"], dot["cy"]) for dot in dots}
    assert len(places) == len(agents)
    texts = json.loads(page.data["script", "application/json"][0])
    assert f"{agents[0].passed} of 8 passed" in texts[0]
    assert "best belief" in texts[found.best]


def test_it_needs_no_network_and_nothing_in_an_artefact_ends_the_script():
    evil = "</script><script>alert(1)</script><!-- "
    found = search(evil, lambda a, log, seed: a + "x", lambda a, task: True, TASKS, 20)
    text = tree(found.archive, found.best)
    assert text.count("<script") == 2
    assert "alert(1)</script>" not in text
    assert not any(word in text for word in ("http:", "https:", "src=", "@import", "url("))
    assert Reader(text).open == []


def test_a_lone_root_and_a_long_line_can_be_drawn():
    lone = search(-9, modify, evaluate, TASKS, 5)
    assert tree(lone.archive, lone.best).count("<circle") == 1


def test_patches():
    assert patch({"a": 1, "b": 2}, {"a": 3, "c": 4}) == "a: 1 -> 3\nb: 2 -> (default)\nc: (default) -> 4"
    assert patch("one\ntwo\n", "one\nthree\n") == "-two\n+three"
    assert patch(1, 2) == "2"
