"""The page of a report: whole, without the network, and no place for a stranger's markup."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from checkpoints import make_checkpoint
from converting import PAGE, REPORT

import molae.cli
from molae import ConvertConfig, convert, inspect
from molae.convert import Report
from molae.convert.fitting import energy_curve
from molae.convert.report import CompressedRow, HealRow, TypeRow
from molae.errors import CheckpointError
from molae.report.markup import escape, tag
from molae.report.page import page_text, write_page
from molae.report.svg import Bins, Scale, Series, heatmap, line_chart, ticks

VOID = {"meta", "br", "col", "hr"}
HOSTILE = "\"><script>alert('&1')</script><img src=x onerror=alert(1)>\u202e\x00\ud800"


class Reader(html.parser.HTMLParser):
    """Checks that elements nest, and keeps what there is of them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attrs):
        self.handle_startendtag(name, attrs)
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("page")
    src = make_checkpoint(path / "src", E=8)
    convert(src, path / "dst", ConvertConfig(size=0.5))
    return path / "dst"


@pytest.fixture
def report(folder):
    return Report.from_file(folder)


def large(L=48, E=128, k=1, D=2048, F=768):
    """A report as of a model of so many layers and experts, with all that it can have."""
    rng = np.random.default_rng(3)
    groups = [list(range(start, start + k)) for start in range(0, E, k)]
    rows, curve = [], [float(f"{x:.4g}") for x in np.linspace(1, 0, 33) ** 2]
    for layer in range(L):
        tokens = rng.integers(0, 9000, E).tolist()
        for kind in ("gate_proj", "up_proj", "down_proj"):
            ranks = rng.integers(20, 700, len(groups)).tolist()
            error = float(rng.uniform(0.2, 0.6))
            rows.append(
                TypeRow(
                    layer, kind, groups, ranks, int(rng.integers(9e7, 2e8)), E * F * D, error,
                    error / 2, min(1.0, error * 1.5), rng.uniform(0, 0.5, len(groups)).tolist(),
                    rng.uniform(300, 600, len(groups)).tolist(), [0] * len(groups),
                    [False] * len(groups), float(rng.uniform(1, 90)), error / 2,
                    None if kind == "gate_proj" else [error, error * 0.8, error * 0.7], tokens,
                    curve, [[s, float(rng.exponential(0.01))] for s in (0.7, 0.45, 0.25, 0.12)],
                    float(rng.exponential(0.01)),
                )
            )  # fmt: skip
    compressed = [CompressedRow(n, 1 + n % 4, [0.6, 0.4, 0.3], 65536, 12.0) for n in range(L)]
    healed = [
        HealRow(n, [0.3, 0.2 + n / 999], [[s, 0.3 - s / 9e3] for s in range(0, 900, 50)], 900, 60.0)
        for n in range(L)
    ]
    dense = {"shared": 0, "private": 0, "perm": 0, "dense": L * E * F * D}
    stored = {"shared": 10**9, "private": 10**10, "perm": 10**6, "dense": 0}

    def side(numbers, share):
        experts = int(3 * L * E * F * D * share)
        return {
            "numbers": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), numbers),
            "expert_numbers": experts, "other_numbers": 2 * 10**9, "expert_bytes": 2 * experts,
            "other_bytes": 4 * 10**9, "flops_per_token": experts / 8,
            "total_numbers": experts + 2 * 10**9, "total_bytes": 2 * experts + 4 * 10**9,
        }  # fmt: skip

    plan = {
        "kind": "convert", "source": "org/large-model", "family": "qwen3_moe", "dtype": "BF16",
        "layout": "per_expert", "letters": {"L": L, "E": E, "K": 8, "D": D, "F": F},
        "method": "latent", "form": "gauge", "size_asked": 0.5, "size_reached": 0.5,
        "before": side(dense, 1), "after": side(stored, 0.5), "flops_ratio": 0.5,
        "types": {k: {"group_sizes": [1], "ranks": [700, 300, 20, 10, 5], "layers": L}
                  for k in ("gate_proj", "up_proj", "down_proj")},
        "candidates": [], "memory_bytes": 10**10, "light": "vectors",
    }  # fmt: skip
    files = {
        f"model-{n:05}-of-{L:05}.safetensors": {"bytes": 10**9, "sha256": "ab" * 32}
        for n in range(1, L + 1)
    }
    facts = {"text": "text.txt", "tokens_sha256": "cd" * 32, "sequences": 128, "length": 2048}
    return Report(
        "convert", {"molae": "0.1.0", "threads": 2}, {"size": 0.5, "calibration": facts}, plan,
        {}, tuple(rows), files, 9000.0, tuple(compressed), tuple(healed),
    )  # fmt: skip


# ------------------------------------------------------------------- the whole page


@pytest.mark.parametrize("make", [lambda report: report, lambda report: large(4, 8)])
def test_it_is_html_and_needs_nothing_else(report, make):
    text = page_text(make(report))
    found = Reader(text)
    assert len(found.ids) == len(set(found.ids))
    for name, key, value in found.attributes:
        assert key not in ("src", "srcset", "style", "data", "action", "xlink:href"), (name, key)
        assert not key.startswith("on")
        if key == "href":
            assert value.removeprefix("#") in found.ids
        if key in ("aria-labelledby", "aria-describedby"):
            assert set(value.split()) <= set(found.ids)
    assert not {"script", "link", "img", "iframe", "object", "base", "foreignobject"} & set(
        found.tags
    )
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    policy = next(v for n, k, v in found.attributes if k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for chart in re.findall("<svg.*?</svg>", text, re.S):
        assert 'aria-hidden="true"' in chart or ("<title id=" in chart and "<desc id=" in chart)
        assert "nan" not in chart
        assert "inf" not in chart


def test_the_style_sheet_is_the_one_that_the_policy_lets_in(report):
    import base64
    import hashlib

    text = page_text(report)
    sheet = re.search("<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"style-src &#x27;sha256-{digest}&#x27;" in text


def test_the_same_report_gives_the_same_bytes(folder, report, tmp_path):
    first = write_page(report, tmp_path)
    assert first == tmp_path / PAGE
    second = write_page(Report.from_file(folder / REPORT), tmp_path / "other.html")
    assert first.read_bytes() == second.read_bytes()


def test_the_figures_are_those_of_the_report(folder, report):
    text = " ".join(Reader(page_text(report)).texts)
    before, after = report.plan["before"], report.plan["after"]
    for stored in (before, after):
        for key in ("expert_numbers", "total_numbers", "total_bytes"):
            assert f"{stored[key]:,}" in text
    assert f"{inspect(folder).active_parameters:,}" in text
    for kind in ("gate_proj", "up_proj", "down_proj"):
        assert f"{report.error(kind):.4f}" in text
    for row in report.rows:
        assert f"{row.error:.4f}" in text
    for entry in report.files.values():
        assert entry["sha256"] in text
    assert "No text ran through the model" in text


def test_a_large_model_makes_a_page_that_is_not_large():
    report = large()
    text = page_text(report)
    assert len(text.encode()) < 400_000
    words = " ".join(Reader(text).texts)
    for section in ("Training of the layers", "Compressed experts", "Routing and time", "Spectra"):
        assert section in words
    for row in report.rows[-3:]:
        assert f"{max(row.ranks)}" in words
    foreseen = sum(row.foreseen for row in report.rows)
    assert f"{foreseen:.3g} nats a token were foreseen" in words


def test_every_rank_and_token_count_of_a_small_one_is_there():
    report = large(4, 32)
    words = " ".join(Reader(page_text(report)).texts)
    for row in report.rows:
        assert " ".join(map(str, row.ranks)) in words
        assert " ".join(map(str, row.tokens)) in words
        assert f"{row.foreseen:.3g}" in words
    for row in (*report.compressed, *report.healed):
        assert f"{row.layer_error[-1]:.4f}" in words


# ------------------------------------------------------------------------ strangers


def test_hostile_names_stay_text(report):
    plan = json.loads(json.dumps(report.plan))
    plan |= {"source": HOSTILE, "family": HOSTILE, "dtype": HOSTILE, "method": HOSTILE,
             "form": HOSTILE, "layout": HOSTILE, "light": HOSTILE}  # fmt: skip
    changed = dataclasses.replace(
        report,
        plan=plan,
        settings={HOSTILE: HOSTILE, "calibration": {"text": HOSTILE, "sequences": 2, "length": 9}},
        versions={"molae": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}},
        files={HOSTILE: {"bytes": 1, "sha256": HOSTILE}},
    )
    text = page_text(changed)
    assert text.encode()  # a lone surrogate could not be written
    found = Reader(text)
    usual = set(Reader(page_text(report)).tags)
    assert set(found.tags) <= usual
    assert not {"\u202e", "\x00", "\ud800"} & set(text)
    assert sum("<script>alert('&1')" in words for words in found.texts) >= 8


def test_everything_but_markup_is_escaped():
    assert escape("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert tag("p", "<b>", title='"<') == '<p title="&quot;&lt;">&lt;b&gt;</p>'
    assert tag("p", tag("b", "x"), None, 3) == "<p><b>x</b>3</p>"
    assert tag("path", d="M0 0") == '<path d="M0 0"/>'


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["plan"].pop("before"),
        lambda d: d["plan"]["letters"].pop("E"),
        lambda d: d.update(kind="other"),
        lambda d: d["rows"][0].update(error="much"),
        lambda d: d["rows"][0].update(dense_numbers=0),
        lambda d: d.update(versions=None),
        lambda d: d["files"]["config.json"].pop("bytes"),
    ],
)
def test_a_report_changed_by_hand_is_refused(report, change):
    data = json.loads(json.dumps(report.to_dict()))
    change(data)
    with pytest.raises(CheckpointError, match=REPORT):
        page_text(Report.from_dict(data))


def test_numbers_that_are_none_are_left_out(report):
    rows = [dataclasses.replace(row, error=float("nan")) for row in report.rows[:1]]
    text = page_text(dataclasses.replace(report, rows=(*rows, *report.rows[1:])))
    for d in re.findall(' (?:d|x|y|cx|cy|width|height)="([^"]*)"', text):
        assert "nan" not in d


# ---------------------------------------------------------------------- the command


@pytest.fixture
def run(capsys):
    def call(*args):
        code = molae.cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_convert_writes_it_and_report_makes_it_again(run, folder, tmp_path):
    src, dst = folder.parent / "src", tmp_path / "dst"
    assert run("convert", src, dst, "--size", "0.5", "--quiet") == (0, "", "")
    first = (dst / PAGE).read_bytes()
    (dst / PAGE).unlink()
    code, out, err = run("report", dst)
    assert (code, err) == (0, "")
    assert str(dst / PAGE) in out
    assert (dst / PAGE).read_bytes() == first
    code, out, _ = run("report", dst / REPORT, "--json", "--out", tmp_path / "mine.html")
    assert json.loads(out) == json.loads((dst / REPORT).read_text())
    assert (tmp_path / "mine.html").read_bytes() == first
    # Only what molae wrote is replaced, and the page is of that.
    assert run("convert", src, dst, "--size", "0.6", "--quiet", "--overwrite") == (0, "", "")
    assert (dst / PAGE).read_bytes() != first
    code, _, err = run("materialize", dst, tmp_path / "whole", "--quiet")
    assert (code, err) == (0, "")
    assert "multiplied out by molae" in (tmp_path / "whole" / PAGE).read_text()
    assert (tmp_path / "whole" / "molae-report.source.html").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such report; is this a result of molae"),
        ('{"molae_report": 1, "rows": [', "not JSON: .*cut short"),
        ("[1, 2]", "no JSON object"),
        ('{"molae_report": 2}', "reads version 1, got 2"),
        ('{"molae_report": 1}', "missing or unknown entry"),
    ],
)
def test_what_is_no_report_is_told(run, tmp_path, content, text):
    if content is not None:
        (tmp_path / REPORT).write_text(content)
    code, out, err = run("report", tmp_path)
    assert (code, out) == (1, "")
    assert re.search(text, err)
    assert "Traceback" not in err
    assert not (tmp_path / PAGE).exists()


def test_a_run_that_is_not_finished_is_told(run, tmp_path):
    (tmp_path / ".molae-journal.jsonl").write_text("{}\n")
    code, _, err = run("report", tmp_path)
    assert code == 1
    assert "not finished" in err


def test_a_page_that_cannot_be_written_is_told(run, folder, tmp_path):
    code, _, err = run("report", folder, "--out", tmp_path / "no" / "such" / "page.html")
    assert code == 1
    assert "page.html" in err
    assert "--out FILE" in err


# --------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.37), (0, 1e-7), (0, 8.1e9), (-3, 4), (5, 5)]
)
def test_ticks_reach_around_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_scales():
    plain, log = Scale(0, 10, 100, 200), Scale(0.01, 100, 0, 8, log=True)
    assert (plain(0), plain(5), plain(10), plain(99)) == (100, 150, 200, 200)
    assert (log(0.01), log(1), log(100)) == (0, 4, 8)


def test_points_lie_where_their_values_say():
    series = Series("a", "gate", [(0.0, 0.0), (4.0, 1.0), (8.0, float("nan"))], tips=["", "x", ""])
    chart = line_chart("k", "t", "d", [series], x_label="x", y_label="y", x_ticks=(0, 4, 8))
    circles = re.findall('<circle cx="([^"]+)" cy="([^"]+)"', chart)
    assert len(circles) == 2  # none where there is no number
    (x0, y0), (x1, y1) = [(float(x), float(y)) for x, y in circles]
    assert x0 < x1
    assert y0 > y1  # upward
    assert x1 == 44 + (420 - 12 - 44) / 2  # in the middle


def test_heat_maps_merge_neighbours_of_one_colour():
    bins = Bins((1.0,), ("q0", "q1"), ("low", "high"))
    wide = [("0", [0.0] * 500 + [2.0] * 300), ("1", [None, *[2.0] * 799])]
    chart = heatmap("k", "t", "d", wide, bins, x_label="x", tip=lambda *_: "")
    assert 'class="band q0" d="M0 0h500"' in chart
    assert 'class="band q1" d="M500 0h300M1 1h799"' in chart
    small = [("0", [0.0, 2.0]), ("1", [None, 1.0])]
    chart = heatmap("k", "t", "d", small, bins, x_label="x", tip=lambda r, c, v: f"{r} {c} {v}")
    assert re.findall("<title>(.*?)</title>", chart) == ["0 0 0.0", "0 1 2.0", "1 1 1.0"]
    assert chart.count('class="area q1"') == 2


def test_energy_curves_are_the_tails_of_the_spectra():
    spectra = [np.arange(64, 0, -1.0), np.ones(32)]
    found = energy_curve(spectra)
    total = sum((s**2).sum() for s in spectra)
    assert found[0] == 1
    assert found[-1] == 0
    for i in (5, 16, 31):
        beyond = sum((s[i * len(s) // 32 :] ** 2).sum() for s in spectra)
        assert found[i] == pytest.approx(beyond / total, rel=1e-3)
    assert energy_curve([]) is None
    assert energy_curve([np.zeros(3)]) is None
