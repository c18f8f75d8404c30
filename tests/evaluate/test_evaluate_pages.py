"""The HTML pages: what is in them, and how they look in a browser."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import BROWSER, WIDTHS, browse

from joint_train.evaluate import against, compare, page, recommend, report
from joint_train.evaluate.__main__ import main


def near(value: float, spread: float) -> dict:
    return {"value": value, "low": value - spread, "high": value + spread}


def results(**changes) -> dict:
    """What an evaluation of a good pair finds."""
    kinds = ["code", "conversation", "extraction", "mathematics", "reasoning", "rewriting", "summary", "writing"]
    speculative = [
        {
            "num_steps": k,
            "tokens": 5120,
            "seconds": 100.0,
            "verifications": 2000,
            "tokens_per_forward": near(1 + 2.2 * (1 - 0.68**k), 0.08),
            "tokens_per_second": near(50.0, 2.0),
            "speedup": near(1 + 0.9 * (1 - 0.68**k) - 0.03 * k, 0.06),
            "acceptance": [
                {"drafted": 2000, "accepted": int(2000 * 0.68 ** (i + 1))}
                | {"share": near(0.68 ** (i + 1), 0.02), "share_if_reached": near(0.68, 0.02)}
                for i in range(k)
            ],
            "tokens_per_forward_by_category": {name: near(1.8 + 0.1 * i, 0.15) for i, name in enumerate(kinds)},
            "differences": [],
        }
        for k in range(1, 9)
    ]
    return {
        "base": "/models/gemma-4-E4B-it",
        "drafter": "/models/gemma-4-E4B-it-assistant",
        "when": "2026-07-01T12:00:00+00:00",
        "versions": {"joint-train": "0.1.0", "torch": "2.13.0", "commit": "0123456789abcdef0123456789abcdef01234567"},
        "options": {"num_steps": list(range(1, 9)), "max_new_tokens": 128, "temperature": 0.0, "dtype": "bfloat16"},
        "prompts": {"name": "general", "count": 40},
        "plain": {"tokens": 5120, "seconds": 170.0, "tokens_per_second": near(30.0, 1.0)},
        "speculative": speculative,
        "examples": [{"category": "code", "prompt": "Explain <b>this</b> & that", "text": "A text.\n" * 12}],
        "sampling": None,
        "calibration": CALIBRATION,
    } | changes


CALIBRATION = {
    "num_steps": 8,
    "reliability": {
        "bins": [
            {
                "from": b / 10,
                "to": b / 10 + 0.1,
                "drafts": 300 * (b > 1),
                "confidence": b / 10 + 0.04 if b > 1 else None,
            }
            | {"accepted": near(b / 10 - 0.03, 0.04)}
            for b in range(10)
        ],
        "error": 0.0712,
    },
    "thresholds": [
        {"threshold": t, "tokens_per_forward": near(3 - t, 0.1), "drafts_per_forward": near(8 - 6 * t, 0.2)}
        | {"accepted": near(0.25 + t / 2, 0.01), "tokens_per_second": near(40 + 10 * t, 2)}
        for t in (0.0, 0.2, 0.4, 0.6, 0.8)
    ],
}
SAMPLING = [
    {"way": way, "tokens": 5120, "bases_distribution": abs(z) < 4}
    | {"tokens_per_forward": near(length, 0.1) if length else None}
    | {"accepted": [near(length / 5, 0.01)] * 2 if length else None}
    | {"reliability": {"bins": CALIBRATION["reliability"]["bins"][5:], "error": 0.0123} if way == "argmax" else None}
    | {"deviation": {"log_probability": z, "most_likely": z}}
    for way, z, length in (
        ("plain", 0.3, None),
        ("argmax", -0.7, 1.5),
        ("sampled", 1.2, 2.5),
        ("transformers", 18.2, 3),
    )
]
DIFFERENCE = {"prompt": 7, "position": 31, "plain": " the", "speculative": " a", "margin": 0.001}


def parts(names: list[str], start: float) -> list[dict]:
    return [
        {"name": name, "verifications": 900 - 100 * i}
        | {"tokens_per_forward": near(start - 0.2 * i, 0.1 + 0.05 * i), "first": near(0.8 - 0.06 * i, 0.05)}
        for i, name in enumerate(names)
    ]


def where_of(start: float) -> dict:
    return {
        "num_steps": 6,
        "position": parts(["1 to 16", "17 to 32", "33 to 64", "65 to 128", "129 to 256"], start),
        "context": parts(["1 to 128", "129 to 256", "257 to 512", "1,025 to 2,048"], start),
        "span": parts(["thinking", "tool calls", "code blocks", "plain text"], start),
        "language": parts(["de", "en"], start),
    }


def all_results() -> dict:
    """With everything that an evaluation can be asked for."""
    found = results(sampling=SAMPLING, where=where_of(3.0))
    names = [("enable_thinking=true", 3.0), ("enable_thinking=false", 2.5)]
    found["columns"] = [{"name": n, "speculative": found["speculative"], "where": where_of(s)} for n, s in names]
    del found["columns"][1]["where"]["position"][4]
    policies = []
    for k in range(9):
        for threshold in (0.0, 0.4) if k else (0.0,):
            tokens, cost = 1 + 2.2 * (1 - 0.68**k), 0.05 * k * (1 - threshold / 2)
            speeds = {str(b): b * tokens / (1 + cost * b**0.5) for b in (1, 8, 64)}
            drafts = near(k * (1 - threshold), 0.1)
            policy = {"num_steps": k, "threshold": threshold, "tokens_per_forward": near(tokens, 0.08)}
            policies.append(policy | {"drafts_per_forward": drafts, "tokens_per_second": speeds})
    found["recommend"] = {"cost": "the roofline of one h100", **recommend.chosen(policies, [1, 8, 64])}
    rows, before = [], {"tokens_per_forward": 1.6, "first": 0.3, "accepted": 0.2, "speedup": 1.2}
    for k in range(1, 9):
        row = {
            name: {"before": near(a, 0.1), "after": near(a + 0.5, 0.1), "difference": near(0.5, 0.05)}
            for name, a in before.items()
        }
        row["speedup"]["ratio"] = near(1.3, 0.04)
        rows.append({"num_steps": k, **row})
    found["against"] = {"drafter": "/models/stale/drafter", "rows": rows}
    found["options"]["device"] = "cpu"
    return found


class Text(HTMLParser):
    """Checks that tags are closed in order, and gathers the text."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data


def rows(text: str) -> list[list[str]]:
    """The rows of a page's tables, as text."""
    found = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    ]
    return [[Text(cell).text.strip() for cell in row] for row in found]


def write_run(folder: Path, name: str, pairing: str, slow: float) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"output_dir: {run}\ndrafter:\n  pairing: {pairing}\noptim:\n  lr: 0.001\n")
    lines = []
    for step in range(501):
        record = {"step": step, "time": 1000.0 + step}
        if step:
            record |= {"base_loss": 8 * slow**step + 3, "drafter_loss": 6 * slow**step + 3}
            record |= {"tokens_per_second": 9000 + 50 * (step % 7), "grad_norm": 1 + 0.1 * (step % 5), "bad_steps": 0}
        if step % 50 == 0:
            record |= {"val/base_loss": 8 * slow**step + 3.1, "val/drafter_ce": 6 * slow**step + 3.1}
            record |= {"val/tokens_per_forward": 2.5 - 1.5 * slow**step, "val/accepted_length_expected": 2.0}
        lines.append(json.dumps(record) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 501, "torn')
    return run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [write_run(tmp_path, "serving", "serving", 0.99), write_run(tmp_path, "same", "same_token", 0.995)]


def test_the_page_shows_the_numbers_and_is_well_formed():
    text = Text(report.page(results(sampling=SAMPLING))).text
    assert "40 prompts" in text and "token for token" in text
    assert "With K = 6 drafts, 2.98 [2.90, 3.06] tokens per base forward" in text  # K = 6 is the fastest
    assert "NOT" not in text and "+18.2" in text
    assert "Explain <b>this</b> & that" in text  # a text isn't markup


def test_every_number_is_in_its_own_place():
    found = rows(report.page(results(sampling=SAMPLING)))
    assert ["3", "2.51 [2.43, 2.59]", "50.0 [48.0, 52.0]", "1.53 [1.47, 1.59]"] in found
    for position, accepted in ((1, "1,360"), (3, "628")):
        share = 0.68**position
        shown = [f"{share:.2f} [{share - 0.02:.2f}, {share + 0.02:.2f}]", "0.68 [0.66, 0.70]"]
        assert [str(position), *shown, f"{accepted} of 2,000"] in found
    assert ["plain", "1", "30.0 [29.0, 31.0]", "1"] in found
    assert ["plain", "yes", "+0.3", "+0.3", "–", "–", "5,120"] in found
    assert ["argmax drafts", "yes", "-0.7", "-0.7", "1.50 [1.40, 1.60]", "0.30, 0.30", "5,120"] in found
    assert ["sampled drafts", "yes", "+1.2", "+1.2", "2.50 [2.40, 2.60]", "0.50, 0.50", "5,120"] in found
    assert ["as transformers", "no", "+18.2", "+18.2", "3.00 [2.90, 3.10]", "0.60, 0.60", "5,120"] in found
    assert ["0.3 to 0.4", "0.34", "0.27 [0.23, 0.31]", "300"] in found
    assert not any(row[0] == "0.1 to 0.2" for row in found)  # no drafts
    shown = ["2.40 [2.30, 2.50]", "4.40 [4.20, 4.60]", "0.55 [0.54, 0.56]", "46.0 [44.0, 48.0]"]
    assert ["0.6", *shown] in found and ["none", "3.00 [2.90, 3.10]"] in [row[:2] for row in found]
    said = report.text(results(sampling=SAMPLING)).splitlines()
    assert "    3  0.31 [0.29, 0.33]" in said
    assert [("NOT" in line) for line in said if line.startswith("sampling")] == [False, False, False, True, False]
    assert '"draft_sample_method": "probabilistic"' in said[-1]
    assert "draft_sample_method" in Text(report.page(results(sampling=SAMPLING))).text
    pages = [Text(report.page(results(sampling=s))).text for s in (None, SAMPLING)]
    assert [("greedy. Mean distance of the two: 0.071" in text) for text in pages] == [True, True]
    assert [("sampling. Mean distance of the two: 0.012" in text) for text in pages] == [False, True]


def test_the_parts_that_are_asked_for_have_their_numbers():
    found = all_results()
    shown = rows(report.page(found))
    assert ["33 to 64", "2.60 [2.40, 2.80]", "0.68 [0.63, 0.73]", "700"] == shown_part(shown, "33 to 64")[:4]
    assert shown_part(shown, "129 to 256")[4:] == ["–"] * 3  # the other column has no answer so long
    assert shown_part(shown, "code blocks")[:2] == ["code blocks", "2.60 [2.40, 2.80]"]
    assert ["1", "1.70 [1.62, 1.78]", "1.70 [1.62, 1.78]"] in shown  # side by side
    best = found["recommend"]["best_without_threshold"]
    assert [best[b]["num_steps"] for b in ("1", "8", "64")] == [5, 3, 1]
    one = shown_part(shown, "K = 5")
    plain, policy = (recommend.find(found["recommend"], {"num_steps": k, "threshold": 0.0}) for k in (0, 5))
    assert one[4] == f"{policy['tokens_per_second']['8'] / plain['tokens_per_second']['8']:.2f}"
    top = [row for row in shown if row[0].startswith("K = ") and any(cell.endswith("*") for cell in row)]
    assert {row[0] for row in top} == {recommend.name_of(p) for p in found["recommend"]["best"].values()}
    change = ["tokens per base forward", "1.60 [1.50, 1.70]", "2.10 [2.00, 2.20]", "+0.50 [+0.45, +0.55]"]
    row = against.best_row(found["against"]["rows"])
    assert row["num_steps"] == 1 and shown_part(shown, "tokens per base forward") == change
    assert max(len(line) for line in report.text(found).splitlines() if not line.startswith("sampling")) <= 80
    table = against.markdown(found)
    assert table.splitlines()[0] == "| K = 1 | before | after | difference |"
    assert "Before: stale/drafter; after: gemma-4-E4B-it-assistant" not in table  # as short as tells them apart
    assert "Before: drafter; after: gemma-4-E4B-it-assistant" in table


def shown_part(shown: list[list[str]], name: str) -> list[str]:
    return next(row for row in shown if row[0] == name)


def test_no_axis_has_half_drafts_or_half_steps(runs):
    found = all_results()
    for result in (found, {**results(), "speculative": results()["speculative"][:2]}):
        for label, svg in re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", report.page(result), re.DOTALL):
            if "K, drafts" not in svg and "draft position" not in svg:
                continue
            texts = re.findall(
                r"<text[^>]*>(.*?)</text>", svg[: svg.index("K, drafts" if "K, d" in svg else "draft p")]
            )
            assert texts and all("." not in text for text in texts), (label, texts)


def test_error_bars_reach_from_low_to_high():
    drawn = {}
    axes = SimpleNamespace(errorbar=lambda x, y, yerr, **style: drawn.update(x=x, y=y, yerr=yerr))
    report.errorbars(
        axes, [(1, {"value": 2.0, "low": 1.5, "high": 4.0}), (2, {"value": 3.0, "low": None, "high": None})]
    )
    assert drawn == {"x": [1, 2], "y": [2.0, 3.0], "yerr": [[0.5, 0], [2.0, 0]]}


def test_differences_are_shown_with_their_margin():
    found = results()
    found["speculative"][2]["differences"] = [DIFFERENCE]
    shown = Text(report.page(found)).text
    assert "' the'" in shown and "0.001" in shown
    assert "K = 3, prompt 7: differs at token 31" in report.text(found)
    assert "39/40" in report.text(found)


def test_the_table_fits_80_columns():
    assert max(map(len, report.text(results()).splitlines())) <= 80


def test_what_was_not_measured_is_a_dash_and_no_crash():
    nothing = {"value": None, "low": None, "high": None}
    found = results()
    for s in found["speculative"]:
        s |= {"tokens_per_forward": nothing, "tokens_per_forward_by_category": {"a": nothing, "b": nothing}}
        for position in s["acceptance"]:
            position |= {"share": nothing, "share_if_reached": {"value": 0.5, "low": None, "high": None}}
    found["calibration"] = calibration = copy.deepcopy(CALIBRATION)
    calibration["reliability"] = {"bins": [], "error": None}
    calibration["thresholds"] = [
        {key: nothing for key in row} | {"threshold": 0.0} for row in calibration["thresholds"]
    ]
    assert "–" in Text(report.page(found)).text
    assert "–" in report.text(found)


def test_without_matplotlib_there_is_a_page_without_plots(monkeypatch):
    monkeypatch.setattr(report, "plots_available", lambda: False)
    text = report.page(results())
    assert "<svg" not in text and "2.98 [2.90, 3.06]" in text


def test_a_figure_has_no_size_of_its_own_and_is_the_same_each_time():
    def draw(axes):
        axes.plot([1, 2], [3, 4])

    svg = page.figure(draw, "x", "a label")
    head = svg[: svg.index(">")]
    assert "viewBox" in head and " width=" not in head and " height=" not in head
    assert "a label" in svg
    assert svg == page.figure(draw, "x", "a label")


def test_runs_side_by_side(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    text = Text((tmp_path / "page.html").read_text()).text
    said = capsys.readouterr().out
    for shown in (text, said):
        assert "drafter.pairing" in shown and "same_token" in shown
        assert "optim.lr" not in shown  # the same in both
    assert "11.100 → 3.153" in said  # base validation loss of the first: 8 + 3.1, 8 * 0.99**500 + 3.1
    assert (tmp_path / "page.html").read_text().count("<svg") == 8
    assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith("written: "))
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    found = list(json.loads(capsys.readouterr().out).values())
    assert found[0]["metrics"]["val/base_loss"]["first"] == pytest.approx(11.1)
    assert found[0]["config"]["drafter.pairing"] != found[1]["config"]["drafter.pairing"]


def test_results_of_runs_by_their_meaning():
    records = [
        {"step": step, "time": 60.0 * step, "tokens_per_second": speed, "bad_steps": bad, "val/base_loss": loss}
        for step, speed, bad, loss in ((0, None, None, 9.0), (1, 10.0, 0, None), (2, 30.0, 2, 4.0), (3, 20.0, 2, None))
    ]
    runs = [compare.Run("a", Path("a"), {}, records), compare.Run("b", Path("b"), {}, [{"step": 7, "time": 1.0}])]
    assert compare.result_rows(runs) == [
        ["steps", "3", "7"],
        ["base loss", "9.000 → 4.000", "–"],
        ["tokens/s, median", "20", "–"],
        ["minutes from first to last record", "3.0", "0.0"],
        ["bad steps", "2", "0"],
    ]


def test_differences_are_of_any_run_and_of_keys_that_one_lacks():
    configs = [{"x": 1, "same": 0, "output_dir": "a"}, {"x": 2, "same": 0}, {"x": 1, "same": 0, "new": True}]
    runs = [compare.Run(str(i), Path("r"), config, []) for i, config in enumerate(configs)]
    assert compare.differences(runs) == [["new", "–", "–", "True"], ["x", "1", "2", "1"]]
    configs = [{"data.val": [{"path": name, "weight": 1.0}]} for name in ("a.jsonl", "b.jsonl")]
    runs = [compare.Run(str(i), Path("r"), config, []) for i, config in enumerate(configs)]
    assert compare.differences(runs) == [["data.val", "a.jsonl", "b.jsonl"]]


def test_curves_are_of_the_metric_that_they_name(runs, monkeypatch):
    monkeypatch.setattr(compare, "curve", lambda runs, metric: f"<svg>{metric}</svg>")
    page = compare.page([compare.load_run(folder, folder.name) for folder in runs])
    drawn = dict(re.findall(r"<figcaption>(.*?)</figcaption><svg>(.*?)</svg>", page))
    assert drawn == {
        "base, training": "base_loss",
        "drafter, training": "drafter_loss",
        "base, validation": "val/base_loss",
        "drafter cross-entropy, validation": "val/drafter_ce",
        "accepted length expected, teacher forced": "val/accepted_length_expected",
        "tokens per base forward, generated": "val/tokens_per_forward",
        "tokens/s": "tokens_per_second",
        "gradient norm": "grad_norm",
    }


def test_runs_are_told_apart_by_the_ends_of_their_folders():
    assert compare.names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="twice"):
        compare.names([Path("/a"), Path("/a")])


def test_a_folder_that_is_no_run_is_an_error_that_says_so(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_curves_are_thinned_without_bending_them():
    series = [(step, 2.0 * step) for step in range(1, 1001)]
    thin = compare.smooth(series)
    assert len(thin) <= compare.SMOOTHING
    assert all(y == pytest.approx(2 * x) for x, y in thin)
    assert compare.smooth(series[:10]) == series[:10]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["evaluation", "comparison"])
def test_in_a_browser_nothing_is_cut_off_or_tiny_and_the_console_is_clean(runs, tmp_path, which, width):
    file = tmp_path / "page.html"
    if which == "evaluation":
        file.write_text(report.page(all_results()))
    else:
        assert main(["compare", *map(str, runs), "--out", str(file)]) == 0
    probe = """<iframe id="frame" style="border:0;width:%dpx;height:900px"></iframe><pre id="found"></pre><script>
    const frame = document.getElementById("frame");
    frame.onload = () => {
        const page = frame.contentDocument.documentElement;
        const sizes = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
        const plots = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
        document.getElementById("found").textContent = JSON.stringify(
            {overflow: page.scrollWidth - page.clientWidth, smallest: Math.min(...sizes), plots: plots});
    };
    frame.srcdoc = %s;
    </script>"""
    outer = tmp_path / "probe.html"
    outer.write_text(probe % (width, json.dumps(file.read_text()).replace("</", "<\\/")))
    done = browse(outer.as_uri(), tmp_path / "profile", 1300, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert found["overflow"] <= 0
    assert found["smallest"] >= 9  # height of the smallest text in a plot, in pixels
    assert len(found["plots"]) >= 4 and min(found["plots"]) >= 0.9 * min(width - 32, 440)
