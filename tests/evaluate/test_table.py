"""Reports in a terminal: no figure cut, every reason said, nothing compared in silence."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.console import Console

from mars.cli.evaluate import main
from mars.errors import ConfigError
from mars.evaluate import published, table
from mars.evaluate import report as reports
from mars.evaluate.metrics import catalogue
from mars.evaluate.report import Figure
from tests.reports import plausible

HOSTILE = "[bold]x[/] \x1b[31m\n\u202e\ud800"


def printed(function, *arguments, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    function(*arguments, Console(file=file, width=width))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [20, 40, 80, 120, 300])
def test_no_figure_is_wrapped_or_cut(width):
    made = plausible()
    text = printed(table.print_report, made, width=width)
    for row in table.rows(made).values():
        for metric in row.values():
            if metric.value is not None:
                assert re.search(rf"(?<!\S){re.escape(table.number(metric.value))}(?!\S)", text)
            if metric.low is not None:
                bounds = f"[{table.number(metric.low, 3)}, {table.number(metric.high, 3)}]"
                assert re.search(rf"(?<!\S){re.escape(bounds)}(?!\S)", text)
    if width >= 40:
        blocks = text.split("\n\n")[1:-1]
        assert all(len(line) <= width for block in blocks for line in block.splitlines())
        assert len(blocks) == {40: 4, 80: 2}.get(width, 1)


def test_figures_stand_under_their_set():
    made = plausible()
    lines = printed(table.print_report, made, width=200).split("\n\n")[1].splitlines()
    ends = [m.end() for m in re.finditer(r"\S+", lines[0])]
    assert lines[1].split() == ["oracle"]
    mse = next(line for line in lines if line.startswith("mel MSE ↓"))
    values = {m.end(): m.group() for m in re.finditer(r"[\d.e-]+", mse)}
    expected = [table.number(row["mse"].value) for row in table.rows(made).values()]
    assert [values[end] for end in ends] == expected


def test_each_reason_is_said_once_with_its_metrics():
    text = printed(table.print_report, plausible(lacking=("fad", "fad_infinity", "kad")))
    assert text.count("no VGGish weights") == 1
    assert "not measured: FAD, FAD∞, KAD: no VGGish weights" in text
    assert "not measured: copy ratio (anchor): no copies of those\n" in text


def test_a_report_without_figures_says_why():
    made = plausible(lacking=tuple(catalogue.table()))
    text = printed(table.print_report, made)
    assert "in brackets" not in text
    assert text.count("not measured: ") == 2


def test_notes_are_accounted_for():
    made = plausible()
    text = printed(table.print_report, made)
    assert "real: nsynth (test), 4,096 notes\n" in text
    assert "fake: out/notes, 4,094 notes, 7 padded, 3 clipped, 2 refused\n" in text
    assert text.endswith(f"fingerprint {made.fingerprint[:12]}\n")


def test_names_cannot_control_the_terminal():
    made = plausible()
    fake = replace(made.sets["fake"], source=HOSTILE)
    made = replace(
        made, sets={**made.sets, "fake": fake}, metrics={HOSTILE: Figure(value=1.0), "fad": Figure(reason=HOSTILE)}
    )
    for show in (
        lambda console: table.print_report(made, console),
        lambda console: table.print_comparison({HOSTILE: made, "b": replace(made, seed=1)}, console, console),
    ):
        text = printed(show)
        assert r"[bold]x[/] \x1b[31m" in text
        assert all(c.isprintable() for line in text.split("\n") for c in line)


def test_a_console_without_arrows_gets_letters():
    text = printed(table.print_report, plausible(lacking=("fad_infinity",)), encoding="cp1252")
    assert "FAD v" in text
    assert "PIS ^" in text
    assert "FAD-infinity" in text


def test_equal_protocols_are_compared_without_a_warning():
    made = plausible()
    other = replace(made, created="later", seconds=1.0, sets={**made.sets, "fake": made.sets["real"]})
    assert table.compare({"a.json": made, "b.json": other}) == []


def test_differences_are_named_with_their_values():
    made = plausible()
    metrics = {
        name: replace(metric, n_fake=2000, params={**metric.params, **({"k": 50} if name == "ndb_k" else {})})
        for name, metric in made.metrics.items()
        if name != "fad"
    }
    sets = {**made.sets, "real": replace(made.sets["real"], fingerprint="1" * 64)}
    other = replace(made, seed=7, metrics=metrics, sets=sets, mode="generation")
    measured = [name for name, m in metrics.items() if m.value is not None]
    assert table.compare({"a.json": made, "b.json": other, "c.json": made}) == [
        "mode: reconstruction in a.json and c.json, generation in b.json",
        "seed: 2020 in a.json and c.json, 7 in b.json",
        f"metrics.ndb_k.n_fake and in {len(measured) - 1} more: 4096 in a.json and c.json, 2000 in b.json",
        "metrics.ndb_k.k: 100 in a.json and c.json, 50 in b.json",
        "metrics.fad: in a.json and c.json, not in b.json",
        f"sets.real: {'a' * 12} in a.json and c.json, {'1' * 12} in b.json",
    ]


@pytest.mark.parametrize(
    ("n", "last"), [(8, "versions.p7: 1 in a, 2 in b"), (9, "and 1 more difference"), (20, "and 12 more differences")]
)
def test_many_differences_are_counted(n, last):
    one, other = (plausible(versions={f"p{i}": version for i in range(n)}) for version in "12")
    found = table.compare({"a": one, "b": other})
    assert len(found) == min(n, 9)
    assert found[-1] == last


def test_two_profiles_share_no_table():
    made = plausible()
    found = {"a.json": made, "b.json": replace(made, profile="vinay2022")}
    for call in (table.compare, lambda given: table.print_comparison(given, Console(), Console())):
        with pytest.raises(ConfigError, match=r"standard of a\.json, vinay2022 of b\.json"):
            call(found)


def command(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_shows_reports_side_by_side(tmp_path):
    reports.write(tmp_path / "a.json", plausible())
    reports.write(tmp_path / "b.json", plausible(lacking=("fad",), seed=7))
    (tmp_path / "x").mkdir()
    reports.write(tmp_path / "x/a.json", plausible())
    done = command(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "b.json")
    assert done.exit_code == 0
    assert done.stderr == "warning: seed: 2020 in a.json, 7 in b.json\nwarning: metrics.fad: in a.json, not in b.json\n"
    assert re.search(r"standard profile +a\.json +b\.json\n", done.stdout)
    assert re.search(r"\nnotes +4,094 +4,094\n", done.stdout)
    assert re.search(r"\nFAD ↓ +2\.015 +-\n", done.stdout)
    done = command(tmp_path / "a.json", tmp_path / "x/a.json")  # of one name
    assert done.stderr == ""
    assert str(tmp_path / "a.json") in done.stdout
    assert str(tmp_path / "x/a.json") in done.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.json"], "give two reports or more"),
        (["a.json", "a.json"], "give two reports or more"),
        (["a.json", "v.json"], "want reports of one profile"),
        (["a.json", "none.json"], "none.json does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(files, message, tmp_path):
    reports.write(tmp_path / "a.json", plausible())
    reports.write(tmp_path / "v.json", plausible(profile="vinay2022"))
    done = command(*(tmp_path / file for file in files))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_comparing_does_not_wait_for_pytorch(tmp_path):
    for name in "ab":
        reports.write(tmp_path / f"{name}.json", plausible())
    code = "import sys; from mars.cli.evaluate import main; main(sys.argv[1:], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules", "compare", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_published_figures_stand_beside_those_of_their_profile_and_of_no_other(tmp_path):
    made = plausible()
    file = tmp_path / "vinay.json"
    reports.write(file, replace(made, profile="vinay2022"))
    shown = command(file, "--published")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for name in ("DiffWave", "DDSP", "NSynth", "anchor", "MARS, generated", "published"):
        assert name in text
    for figure in ("7.949", "0.0035", "1.883", "5.337"):
        assert figure in text
    assert "published, not computed by mars: MARS, MARS, generated: Ristori et al. 2025, Table 1" in text
    told = json.loads(command(file, "--published", "--json").stdout)
    assert [row["name"] for row in told["published"]] == [row.name for row in published.TABLE_1]
    assert told["reports"]["vinay.json"]["metrics"]["mse"] == made.metrics["mse"].value
    reports.write(file, made)
    refused = command(file, "--published")
    assert refused.exit_code == 2
    assert "of the statistics of vinay2022, these of standard" in " ".join(refused.output.split())
    assert "--profile vinay2022" in " ".join(refused.output.split())


def test_the_published_figures_are_those_of_the_paper():
    rows = {row.name: [*row.figures.values()] for row in published.TABLE_1}
    assert rows["DDSP"] == [0.20, 0.0053, 0.0020, 3.3224, 5.3371, 0.0130, 0.0666, 1.1519]
    assert rows["MARS"] == [0.19, 0.0035, 0.0015, 2.9602, 5.2047, 0.0143, 0.0915, 1.6429]
    assert rows["MARS, generated"] == [0.15, 0.0066, 0.0017, 3.2220, 4.5357, 0.0201, 0.0795, 1.8833]
    assert [sum(row[i] for row in rows.values()) for i in (0, 7)] == pytest.approx([2.74, 18.1811])
    assert all(set(row.figures) <= set(catalogue.table()) for row in published.TABLE_1)
