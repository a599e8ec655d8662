"""The site of docs/conf.py: built strictly and without network; it loads nothing external; search works offline."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pages import outputs_of, pages
from tests.ranks import REPOSITORY
from tests.unit.report.test_report import CHROMES

NEEDED = ("sphinx", "myst_parser", "furo")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} missing: pip install 'megalite[docs]'"
)


def build(sources: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Builds as in CONTRIBUTING.md, in other folders. A proxy that does not exist makes network access fail."""
    offline = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-c", REPOSITORY / "docs"]
    return subprocess.run(
        [sys.executable, *words, "-d", output.with_suffix(".cache"), sources, output],
        cwd=REPOSITORY, env={**os.environ, **offline}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("docs") / "site"
    done = build(REPOSITORY, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


class _Page(HTMLParser):
    """The resources that a page loads, and the targets of its links."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in ("src", "srcset", "action") if name in values]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "index"):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.ids |= {values[name] for name in ("id", "name") if name in values}


def test_every_page_is_there_and_in_the_sidebar(site: Path) -> None:
    home = _Page(site / "README.html")
    made = {path.relative_to(REPOSITORY).with_suffix(".html") for path in pages()}
    assert len(made) > 25
    for page in made - {Path("README.html")}:
        assert (site / page).is_file() and str(page) in home.links, page
    assert 'url=README.html"' in (site / "index.html").read_text()


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        elsewhere = [
            url for url in _Page(file).loads if "//" in url and not url.startswith("data:")
        ]
        assert elsewhere == [], file
    for file in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", file.read_text()), file


def test_every_internal_link_has_a_target(site: Path) -> None:
    """Sphinx checks only links that it resolves itself; this checks the pages that a browser gets."""
    read = {file: _Page(file) for file in site.rglob("*.html")}
    for file, page in read.items():
        for link in page.links:
            if "://" in link or link.startswith("mailto:"):
                continue
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.is_file(), f"{file}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in read[target].ids, f"{file}: {link}"


def test_the_api_pages_contain_the_docstrings(site: Path) -> None:
    text = re.sub(r"<[^>]*>", "", html.unescape((site / "docs/api.html").read_text()))
    for words in (
        "megalite.load(", "megalite.train(", "loss(", "chat(", "generate(", "class megalite.Model",
        "Raises CheckpointError or ConfigError if the folder cannot be used.",
        "The assistant's answer to a conversation", "repetition_penalty: ", "after_step(",
    ):  # fmt: skip
        assert words in text.replace("\u2019", "'"), words


def test_links_show_titles(site: Path) -> None:
    text = (site / "README.html").read_text()
    assert re.search(r'href="docs/scale.html"[^>]*><span[^>]*>Scale: what is predicted', text)
    assert ">scale.md<" not in text


def test_a_notebook_shows_its_cells_and_outputs(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]*>", "", (site / "docs/tutorials/api.html").read_text()))
    cells = json.loads((REPOSITORY / "docs/tutorials/api.ipynb").read_text())["cells"]
    shown = [line for cell in cells for line in outputs_of(cell).splitlines()]
    assert len(shown) > 10
    for line in shown:
        assert line.strip() in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a page](none.md)\n", "none.md"),
        ("[a part](#none)\n", "none"),
        ("```{toctree}\n/none\n```\n", "'none'"),
    ],
)
def test_a_broken_link_and_a_missing_page_fail(tmp_path: Path, text: str, words: str) -> None:
    """The same settings with a faulty home page."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "README.md").write_text(f"# Home\n\n{text}")
    done = build(sources, tmp_path / "site")
    assert done.returncode == 1
    assert any(words in line and "README.md:3" in line for line in done.stderr.splitlines()), (
        done.stderr
    )


PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const out = document.createElement("pre");
  out.id = "probe";
  const results = [...document.querySelectorAll("#search-results li a")].map((a) => a.getAttribute("href"));
  const fits = document.documentElement.scrollWidth <= innerWidth;
  out.textContent = JSON.stringify([fits, getComputedStyle(document.body).backgroundColor, results]);
  document.body.append(out);
}, 1500));
</script>"""


def browse(site: Path, page: str, query: str = "", width: int = 1280) -> list:
    """[no line is wider than the window, background, search results] of a page opened from its file."""
    browser = next(filter(None, map(shutil.which, CHROMES)), None)
    if browser is None:
        pytest.skip("no headless Chromium: apt-get install chromium-headless-shell")
    probed = (site / page).with_suffix(".probed.html")
    probed.write_text((site / page).read_text().replace("</body>", PROBE + "</body>"))
    arguments = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={site.parent / 'profile'}", "--blink-settings=preferredColorScheme=1",
        "--virtual-time-budget=5000", "--dump-dom", probed.as_uri() + query,
    ]  # fmt: skip
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=90)
    finally:
        probed.unlink()
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1]))


def test_search_works_from_files(site: Path) -> None:
    _, _, results = browse(site, "search.html", "?q=interleaved")
    assert any(result.startswith("docs/layouts.html") for result in results), results


@pytest.mark.parametrize("page", ["README.html", "docs/config.html", "docs/tutorials/chat.html"])
def test_pages_fit_a_phone(site: Path, page: str) -> None:
    fits, ground, _ = browse(site, page, width=390)
    assert fits and ground == "rgb(255, 255, 255)"
