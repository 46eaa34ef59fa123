"""The comparison of backends measures every side on the same images."""

import json

import pytest
import torch
from tiny_model import NAMES, installed

from mit_semseg.benchmarks import backends as bench
from mit_semseg.cli import main
from mit_semseg.export import FORMATS


def test_every_side_is_measured_and_compared(make_model, tmp_path, monkeypatch, capsys):
    installed(FORMATS["onnx"])
    monkeypatch.setattr(bench, "SIDES", {"onnx": ("fp32", "int8")})
    cfg = make_model(tmp_path / "model", NAMES)
    sides = bench.backends(cfg.DIR, tmp_path / "out", rounds=1)
    by_name = {side.name: side for side in sides}
    exact = by_name["torch fp32, this toolkit"]
    assert exact.equal == 1
    assert by_name["onnx fp32"].equal > 0.999
    assert 0.5 < by_name["onnx int8"].equal < 1
    base = [side for side in sides if "this toolkit" in side.name][-1]
    assert base.ratio == 1
    for side in sides:
        assert side.ratio == pytest.approx(base.seconds / side.seconds)
    found = json.loads((tmp_path / "out" / "backends.json").read_text())
    assert [side["name"] for side in found["sides"]] == list(by_name)
    assert found["threads"] == torch.get_num_threads()
    assert (tmp_path / "out" / "backends.png").stat().st_size > 5000
    assert "| onnx int8 |" in capsys.readouterr().out


def test_options_of_backends_need_it(capsys):
    assert main(["bench", "--model", "somewhere"]) == 2
    assert "are for bench --backends" in capsys.readouterr().err
