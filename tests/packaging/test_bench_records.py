"""What the benchmark writes, compares and shows."""

from __future__ import annotations

import copy
import json

import pytest
from bench_cases import make_case, make_record, run

from transfuse.bench import records, report
from transfuse.bench.__main__ import main


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return run(make_case())


class TestRecords:
    def test_round_trip(self, result, tmp_path):
        record = make_record(result)
        path = tmp_path / "record.json"
        records.save(record, path)
        assert records.load(path) == json.loads(json.dumps(record))
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda r: r.pop("results"), "'results' is missing"),
            (lambda r: r.update(schema="other"), "schema"),
            (lambda r: r.update(version=2), "version: expected 1, got 2"),
            (lambda r: r.update(environment=[]), "environment: expected dict, got list"),
            (lambda r: r["results"].append(5), r"results\[1\]: expected an object"),
            (lambda r: r["results"].append(copy.deepcopy(r["results"][0])), "appears twice"),
            (lambda r: r["results"][0].pop("dtype"), r"results\[0\]: field 'dtype' is missing"),
            (lambda r: r["results"][0].update(threads=True), "threads: expected int, got bool"),
            (lambda r: r["results"][0].update(status="fine"), "status: expected one of"),
            (lambda r: r["results"][0]["candidates"][0].update(p50=None), "p20, p50, p80"),
            (lambda r: r["results"][0]["candidates"][0].update(p20=9e9), "p20 <= p50"),
            (lambda r: r["results"][0]["candidates"][0].update(p50="1"), "p50: expected"),
            (
                lambda r: r["results"][0]["candidates"][0].update(status="failed"),
                "without a reason",
            ),
        ],
    )
    def test_malformed_records_are_refused(self, result, tmp_path, damage, message):
        record = copy.deepcopy(make_record(result))
        damage(record)
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(record))
        with pytest.raises(records.RecordError, match=message):
            records.load(path)
        path.unlink()
        with pytest.raises(records.RecordError, match=message):
            records.save(record, path)
        assert not path.exists()

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
    def test_files_that_are_no_records(self, tmp_path, text):
        path = tmp_path / "bad.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(records.RecordError, match=r"bad\.json"):
            records.load(path)
        with pytest.raises(records.RecordError, match="cannot be read"):
            records.load(tmp_path / "absent.json")

    def test_a_failed_write_leaves_the_old_file(self, result, tmp_path, monkeypatch):
        path = tmp_path / "record.json"
        records.save(make_record(result), path)
        before = path.read_bytes()

        def no_space(handle):
            raise OSError("No space left on device")

        monkeypatch.setattr(records.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            records.save(make_record(), path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    def test_numbers_must_be_finite(self, result, tmp_path):
        record = copy.deepcopy(make_record(result))
        record["results"][0]["ratio"] = float("nan")
        with pytest.raises(records.RecordError, match="JSON"):
            records.save(record, tmp_path / "record.json")
        assert list(tmp_path.iterdir()) == []


def scaled(record: dict[str, object], factor: float) -> dict[str, object]:
    changed = copy.deepcopy(record)
    for candidate in changed["results"][0]["candidates"]:
        for name in ("p20", "p50", "p80"):
            candidate[name] *= factor
    return changed


def failed(record: dict[str, object]) -> dict[str, object]:
    changed = copy.deepcopy(record)
    changed["results"][0]["candidates"][0].update(status="failed", reason="wrong", p50=None)
    return changed


class TestCompare:
    @pytest.fixture
    def old(self, result):
        return make_record(result)

    @pytest.mark.parametrize(
        ("change", "factor", "status", "code"),
        [
            (lambda r: scaled(r, 1.0), "1.10", "same", 0),
            (lambda r: scaled(r, 1.05), "1.10", "same", 0),
            (lambda r: scaled(r, 1.2), "1.10", "slower", 1),
            (lambda r: scaled(r, 1.2), "1.5", "same", 0),
            (lambda r: scaled(r, 0.5), "1.10", "faster", 0),
            (failed, "1.10", "lost", 1),
            (lambda r: r | {"results": []}, "1.10", "not run", 0),
        ],
    )
    def test_exit_codes(self, old, tmp_path, capsys, change, factor, status, code):
        records.save(old, tmp_path / "old.json")
        records.save(change(old), tmp_path / "new.json")
        arguments = ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
        assert main([*arguments, "--fail-over", factor]) == code
        assert status in capsys.readouterr().out

    def test_a_bad_file_is_one_line_and_exit_2(self, tmp_path, capsys):
        (tmp_path / "bad.json").write_text("{")
        assert main(["compare", str(tmp_path / "bad.json"), str(tmp_path / "bad.json")]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_table_shows_each_case_with_its_best_peer(self, old, tmp_path, capsys):
        path = tmp_path / "machine.json"
        records.save(old, path)
        assert main(["table", str(path)]) == 0
        *_, row = capsys.readouterr().out.splitlines()
        result = old["results"][0]
        assert row.startswith(f"| {result['title']} | {result['dtype']} | {result['mode']} |")
        assert f", {result['best_peer']} | {result['ratio']:.2f} x |" in row
        assert row.endswith(f"[machine]({path}) |")

    @pytest.mark.parametrize("factor", ["1.0", "0.5", "nan", "inf", "x"])
    def test_a_bad_factor_is_refused(self, factor):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", "a.json", "b.json", "--fail-over", factor])
        assert exit_info.value.code == 2

    def test_another_machine_is_named(self, old, tmp_path, capsys):
        other = copy.deepcopy(old)
        other["environment"]["cpu"] = "another processor"
        records.save(old, tmp_path / "old.json")
        records.save(other, tmp_path / "new.json")
        assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
        assert "another processor" in capsys.readouterr().out


class TestReport:
    def test_plain_text_without_rich(self):
        rows = [("a", "1.0", "x"), ("bb", "10.0", "")]
        text = report.table("title", ("name", "ms", "note"), rows, rich=False)
        assert text.splitlines()[0] == "title"
        assert text.splitlines()[3:] == ["a      1.0  x", "bb    10.0"]

    def test_an_impossible_share_of_the_floor_is_called_out(self, result):
        record = copy.deepcopy(make_record(result))
        record["results"][0]["floor_share"] = 16.0
        assert "disturbed" in report.summary_table(record)
        assert "disturbed" not in report.summary_table(make_record(result))

    def test_brackets_survive(self):
        assert "[1, 2] [bold]" in report.table("t", ("a", "b"), [("x", "[1, 2] [bold]")])

    def test_plot(self, result, tmp_path):
        pytest.importorskip("matplotlib")
        path = tmp_path / "plot.png"
        assert "written" in report.save_plot(make_record(result), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "no plot" in report.save_plot(make_record(), path)
