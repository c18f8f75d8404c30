"""The documentation: it builds without a warning, names only what exists, and looks right in a browser."""

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import BROWSER, WIDTHS, browse

from joint_train.config import choices, groups, keys
from joint_train.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built as `make docs` does: a broken link or a page that isn't in the menu is an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_references_have_every_key_and_metric(site):
    configuration = (site / "configuration.html").read_text()
    for group in groups():
        for name, _, _ in keys(group):
            assert f"<code>{name}</code>" in configuration
    metrics = (site / "metrics.html").read_text()
    assert all(f"<code>{name}</code>" in metrics for name in METRICS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_only_keys_modules_and_files_that_exist(page):
    text = re.sub(r"```python.*?```", "", page.read_text(), flags=re.DOTALL)
    known = {name for group in groups() for name, _, _ in keys(group)}
    dictionaries = {name for group in groups() for name, default, _ in keys(group) if default == "{}"}
    for word in re.findall(r"[`\s'\[{(](\w+(?:\.\w+)+)=?", text):
        is_file = re.search(r"\.(md|py|sh|json|jsonl|yaml|html|svg|toml|txt|gguf|ipynb)$", word)
        if word.split(".")[0] in groups() and not is_file:
            inside = word.rpartition(".")[0] in dictionaries
            assert word in known or inside or any(key.startswith(word + ".") for key in known), word
    for group, name in re.findall(r"[\s`](model|data|\+experiment|\+recipe)=([a-z]\w+)", text):
        assert name in choices()[group], name
    for module in re.findall(r"-m ((?:joint_train|launch|benchmarks)[\w.]*)", text):
        assert find_spec(module), module
    for file in re.findall(r"`((?:joint_train|launch|tests|conf|docker|docs|benchmarks)/[\w./]+)`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_no_page_is_cut_off_and_the_console_is_clean(site, tmp_path):
    names = [file.stem for file in site.glob("*.html") if file.stem != "404"]
    probe = """<body><pre id="found"></pre><script>
    const found = {};
    for (const name of %s) for (const width of %s) {
        const frame = document.createElement("iframe");
        frame.style = `border:0;height:900px;width:${width}px`;
        frame.src = `/${name}.html`;
        frame.onload = () => {
            const page = frame.contentDocument.documentElement;
            found[`${name} ${width}`] = [page.scrollWidth - page.clientWidth, page.querySelectorAll("h1").length];
            document.getElementById("found").textContent = JSON.stringify(found);
        };
        document.body.append(frame);
    }
    </script></body>"""
    (site / "probe.html").write_text(probe % (json.dumps(names), list(WIDTHS)))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/probe.html"
        done = browse(url, tmp_path / "profile", 1300, "--virtual-time-budget=20000", "--dump-dom")
        server.shutdown()
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert len(found) == len(names) * len(WIDTHS) >= 20
    assert all(overflow <= 0 and titles == 1 for overflow, titles in found.values()), found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_search_and_links_work_in_pages_that_are_opened_as_files(site, tmp_path):
    done = browse(
        f"file://{site}/index.html?q=iframe", tmp_path / "a", 1300, "--virtual-time-budget=9000", "--dump-dom"
    )
    assert not re.findall(r'(?:src|href)="(https?://(?!squidfunk)[^"]+\.(?:js|css|woff2?))', done.stdout)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = browse(
        f"file://{site}/index.html?q=watchdog", tmp_path / "b", 1300, "--virtual-time-budget=9000", "--dump-dom"
    ).stdout
    assert re.search(r'href="[^"]+\.html[^"]*" class="md-search-result__link"', found)
    links = re.findall(r'href="([^"#]+\.html)', (site / "index.html").read_text())
    assert links and all((site / link).exists() for link in links if "://" not in link)
