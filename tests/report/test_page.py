"""The page: self-contained, whole, honest about what is missing, and clean in a real browser."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import http.server
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

from tests.report.conftest import hawaii_run, merged_run, tove_run
from tove_jax.report import page, scores
from tove_jax.report.collect import Panel, RunData, collect

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SECTIONS = (
    "numbers", "training", "experts", "routing", "attention", "features", "evaluation", "settings", "provenance",
)  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Keeps elements and text, and fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def text(fabricated):
    return page.render(fabricated[1])


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return page.render(collect(tmp_path_factory.mktemp("empty")))


def test_loads_nothing_and_runs_nothing(text, empty):
    for one in (text, empty):
        reader = read(one)
        for tag, attributes in reader.elements:
            assert tag not in ("script", "iframe", "object", "embed", "form")
            for name in ("src", "href", "srcset", "data", "poster"):
                assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
            assert not any(name.startswith("on") for name in attributes)
        assert not re.search(r"url\(|@import|https?://", one)
        assert len(one.encode()) < 5_000_000


def test_links_ids_and_words_for_pictures(text, empty):
    for one in (text, empty):
        elements = read(one).elements
        ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        links = [attributes["href"] for tag, attributes in elements if tag == "a"]
        assert [link.removeprefix("#") for link in links] == list(SECTIONS)
        named = [attributes.get("aria-labelledby") for tag, attributes in elements if tag == "section"]
        assert {*SECTIONS, *named} <= set(ids)
        assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
        assert all(attributes.get("aria-label") for tag, attributes in elements if tag == "svg")


def test_every_part_is_there(text):
    reader = read(text)
    words = " ".join(" ".join(reader.words).split())
    for wanted in (
        "58.0 %",
        "+12.1",
        "7.6",
        "16.6",
        "efficientnet lite0",
        "Apache-2.0",
        "CC BY-SA 4.0",
        "Over 3 runs",
    ):
        assert wanted in words, wanted
    assert "MoVE-KD" in words and "441 held-out pictures" in words
    assert sum(tag == "svg" for tag, _ in reader.elements) == 7
    # 3 pictures in two galleries: the picture itself, 3 overlays; the picture itself, 6 maps.
    assert sum(tag == "img" for tag, _ in reader.elements) == 3 * (1 + 3) + 3 * (1 + 6)
    assert 'class="missing"' not in text
    assert "<code>image_size</code></th><td><code>64</code>" in text
    assert len(re.findall(r'<tr class="changed">', text)) == 4  # title, image size, width, layers


def words_of(text):
    return " ".join(" ".join(read(text).words).split())


def test_a_run_of_hawaii_shows_both_groups_and_the_collapse(fabricated):
    shown = page.render(hawaii_run(fabricated[1]))
    words = words_of(shown)
    assert "by HAWAII" in words and "Teacher-specific experts by layer" in words and "General experts by layer" in words
    assert "efficientnet lite0" in words and "general 3" in words and "LoRA 0" not in words
    assert "Even: 25 % each. No layer has collapsed." in words and "Even: 33 % each. Collapsed: layer 1." in words
    assert shown.count('class="collapsed"') == 1
    # One largest a layer and group, but for ties; every cell has its share.
    assert shown.count("heat most") == 4 + 4 and shown.count('class="heat') >= 4 * 7
    assert "Sharpness of the token scores" in words and "all, fused" in words
    assert "Variance of the targets" in words and "Expert weights" not in words


def test_a_run_of_tove_shows_gate_and_detaching(fabricated):
    run = tove_run(fabricated[1])
    shown = page.render(run)
    words, reader = words_of(shown), read(shown)
    ids = [attributes.get("id") for tag, attributes in reader.elements if tag == "section"]
    assert "detach" in ids and "routing" not in ids
    assert "enriched by ToVE" in words and "Whom do the tokens listen to?" in words and "Gate weight" in words
    assert "Score of every encoder" in words and "Latency of every encoder" in words and "Text loss" in words
    assert "17.0" in words and "Milliseconds a batch of 8 on cpu." in words
    # A load-balance loss of nothing does not press the others flat.
    assert "1e-12" not in words and "1e-11" not in words
    before = page.render(dataclasses.replace(run, detach={}))
    read(before)
    assert "Run `tove detach`" in before


def test_a_merge_says_what_it_lost(fabricated):
    words = words_of(page.render(merged_run(fabricated[1])))
    assert (
        "merged from a run of ToVE" in words and "ToVE with hed beside it" in words and "demo_tove, last step" in words
    )
    assert "somewhere" not in words.partition("Settings Every")[0]
    assert "the last 2 blocks, begun as the tower of the source; loss: mse" in words
    assert "-3.0 -4.0 to -2.0" in words and "61.0" in words and "0.250" in words and "1.500" in words
    assert "Whom does the student listen to?" not in words and "merged tower" in words
    unjudged = dataclasses.replace(merged_run(fabricated[1]), metrics={})
    assert "was not judged beside its source" in page.render(unjudged)


def test_token_weights_have_a_section_where_there_are_any(fabricated):
    run = fabricated[1]
    panel = Panel("clip", "weights", np.zeros((8, 8, 3), np.uint8), "token weights", "clip", "1.20 ×")
    pictures = tuple(dataclasses.replace(one, panels=(*one.panels, panel)) for one in run.pictures)
    shown = page.render(dataclasses.replace(run, pictures=pictures))
    assert "Which tokens count?" in shown and "1.20 ×" in shown and 'href="#weights"' in shown
    assert "Which tokens count?" not in page.render(run)


def test_a_run_of_a_comparison_has_what_that_judged_once(tmp_path):
    folder = tmp_path / "row" / "seed1"
    (folder / "eval").mkdir(parents=True)
    (folder / "metrics.json").write_text('{"eval/knn/student": 0.5}')
    (tmp_path / "references.json").write_text('{"metrics": {"eval/knn/init": 0.25}}')
    assert "eval/knn/init" not in collect(folder).metrics
    (folder / "eval" / "compared.json").write_text("{}")
    assert collect(folder).metrics == {"eval/knn/init": 0.25, "eval/knn/student": 0.5}


def test_what_is_not_there_is_said_with_its_command(empty):
    assert empty.count('class="missing"') == 9
    assert "run `tove eval`" in empty and "run `tove train`" in empty


def test_foreign_text_stays_text(fabricated):
    title = "<script>alert(1)</script>"
    shown = page.render(dataclasses.replace(fabricated[1], title=title, pictures_licence="<b onclick=x>"))
    assert "<script" not in shown and "<b onclick" not in shown
    assert "&lt;script&gt;" in shown and "&lt;picture&gt; &amp; number 0" in shown


def test_colours_stay_with_their_expert():
    experts = ("clip", "hed")
    assert scores.colour("hed", experts) == "var(--expert-1)" and scores.colour("student", experts) == "var(--student)"
    assert scores.colour("unknown", experts) == "var(--ink)"


def test_partial_metrics_and_names_that_look_like_intervals(tmp_path):
    metrics = {"eval/knn/student": 0.5, "eval/knn/so_low": 0.4, "eval/knn/student_minus_init": 0.1}
    shown = page.render(RunData(title="t", metrics=metrics, history=({"step": 1, "loss/total": None},)))
    read(shown)
    assert "so low" in shown and "50.0" in shown and "no finite values" in shown


def test_small_maps_stay_exact():
    import base64
    import io

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    uri = page.data_uri(image)
    assert uri.startswith("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))), image)
    assert page.data_uri(np.zeros((100, 100, 3), np.uint8)).startswith("data:image/jpeg")


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page and keeps what was asked for."""

    def __init__(self, *args, asked, **kwargs):
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_real_browser(text, tmp_path, width):
    measure = (
        "<script>addEventListener('load', () => { const d = document, r = d.documentElement;"
        "const broken = [...d.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "const out = d.createElement('p'); out.id = 'measured';"
        "out.textContent = [broken, d.images.length, r.scrollWidth <= innerWidth,"
        " [...d.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 40),"
        " performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length].join(' ');"
        "d.body.append(out); });</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", measure + "</body>"), encoding="utf-8")
    asked: list[str] = []
    handler = functools.partial(Handler, directory=str(tmp_path), asked=asked)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=3000",
             "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/page.html"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        server.shutdown()
    measured = re.search(r'<p id="measured">([^<]*)</p>', done.stdout)
    assert measured, done.stderr[-2000:]
    assert measured[1] == "0 33 true true 0"
    assert ":CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert asked == ["/page.html"]
