"""Reports as files, and what a person is shown."""

import io
import json

import pytest
from checkpoints import make_checkpoint
from converting import REPORT, fixed_method
from rich.console import Console

import molae.demo.run
from molae import ConvertConfig, convert
from molae.convert import METHODS, Report, inspect, plan
from molae.convert.jsontext import json_text
from molae.convert.report import TypeRow, total_error
from molae.errors import CheckpointError
from molae.factored import Split
from molae.report.demo import demo_view
from molae.report.tables import inspect_view, plan_view, report_view
from molae.report.units import size_text, time_text


def shown(view):
    console = Console(file=io.StringIO(), width=120)
    console.print(view)
    return console.file.getvalue()


@pytest.fixture
def result(tmp_path):
    src = make_checkpoint(tmp_path / "src", E=8)
    return convert(src, tmp_path / "dst", ConvertConfig(size=0.5))


def test_a_report_is_read_from_its_folder_or_file(tmp_path, result):
    assert Report.from_file(tmp_path / "dst") == result
    assert Report.from_file(tmp_path / "dst" / REPORT) == result


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(molae_report=99), "version 1, got 99"),
        (lambda d: d.pop("molae_report"), "got None"),
        (lambda d: d.pop("rows"), "'rows'"),
        (lambda d: d["rows"][0].update(colour="red"), "colour"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, result, change, text):
    path = tmp_path / "dst" / REPORT
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=text):
        Report.from_file(path)


def test_a_missing_or_broken_report(tmp_path):
    with pytest.raises(CheckpointError, match="no such report"):
        Report.from_file(tmp_path)
    (tmp_path / REPORT).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Report.from_file(tmp_path)


def test_errors_are_put_together_as_a_mean_of_squares(result):
    def row(error):
        return TypeRow(0, "up_proj", [], [], 1, 1, error, 0, 0, [], [], [], [], 0.0)

    assert total_error([]) == 0
    assert total_error([row(0.3), row(0.4)]) == pytest.approx((0.125) ** 0.5)
    kinds = [result.error(kind) for kind in ("gate_proj", "up_proj", "down_proj")]
    assert result.error() == pytest.approx((sum(e**2 for e in kinds) / 3) ** 0.5)


def test_the_tables_show_the_figures(tmp_path, result):
    text = shown(report_view(result))
    assert f"{result.error('down_proj'):.4f}" in text
    found = plan(tmp_path / "src", ConvertConfig(size=0.5))
    text = shown(plan_view(found))
    assert f"{found.after.expert_numbers:,}" in text
    assert f"{found.size_reached:.4f}" in text
    assert f"{found.before.flops_per_token:,.0f}" in text
    assert "taken" in text


def test_unequal_groups_are_shown(tmp_path, monkeypatch):
    split = Split(((0, 1, 2), (3,), (4, 5, 6, 7)), (3, None, 0))
    monkeypatch.setitem(METHODS, "fixed", fixed_method({"up_proj": split}))
    src = make_checkpoint(tmp_path / "src", E=8)
    report = convert(src, tmp_path / "dst", ConvertConfig(method="fixed"))
    text = shown(inspect_view(inspect(tmp_path / "dst")))
    assert "3 groups of 3, 1, 4: 3, dense, 0" in text
    assert "as it was" in text
    assert "up_proj" in shown(report_view(report))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (5.7e6, "5.7 MB"), (12.9e9, "12.9 GB")],
)
def test_sizes_for_people(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.24, "0.2 s"), (61, "61 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_for_people(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2, None], "b": [[1], [2, 3]], "c": [{"x": 1.5}, {"y": []}], "d": {}, "é": "ü"},
        {"nested": [[[1]], [[2]]], "empty": [], "text": 'quo"te', "flag": True, "none": None},
        [],
    ],
)
def test_json_text_is_json(value):
    assert json.loads(json_text(value)) == value


# ---------------------------------------------------------------------------- the demo


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setattr(molae.demo.run, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_transformers")
def test_the_demo_without_transformers(tmp_path):
    said = []
    demo = molae.demo.run.run(out=tmp_path / "out", say=said.append)
    titles = [row.title for row in demo.rows]
    assert titles[0] == "original"
    assert [title for title in titles if title.startswith("latent")] == [
        f"latent {size:g}" for method, size in molae.demo.run.CASES if method == "latent"
    ]
    assert len(demo.rows) - 1 + len(demo.refused) == len(molae.demo.run.CASES)
    sizes = [row.size for row in demo.rows if row.title.startswith("latent")]
    errors = [row.errors["up_proj"] for row in demo.rows if row.title.startswith("latent")]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert not demo.evaluated
    text = shown(demo_view(demo))
    assert "pip install 'molae[hf]'" in text
    assert str(tmp_path / "out") in text
    for row in demo.rows[1:]:
        folder = tmp_path / "out" / row.title.replace(" ", "-")
        assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) >= row.bytes
        assert inspect(f"{folder}-materialized").factored is None
    json.dumps(demo.to_dict())
    again = molae.demo.run.run(out=tmp_path / "out")  # a second run replaces the first
    assert again.rows == demo.rows


def test_the_demo_measures_what_it_made(monkeypatch):
    class Score:
        perplexity, perplexity_se, tokens = 20.0, 0.5, 1000

    measured = []

    def measure(path):
        measured.append(inspect(path).factored)
        return Score

    monkeypatch.setattr(molae.demo.run, "find_spec", lambda name: True)
    monkeypatch.setattr(molae.demo.run, "_measure", measure)
    demo = molae.demo.run.run()
    assert len(measured) == len(demo.rows)
    assert measured == [None] * len(measured)  # ordinary checkpoints, all of them
    text = shown(demo_view(demo))
    assert "20.00 ± 0.50" in text
    assert "1,000 tokens" in text
