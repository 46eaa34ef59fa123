"""What loads, what is refused, and what is reported of it."""

import logging

import pytest
import torch
from heads import Head, Pyramid, same, values

from mit_semseg.weights import load_into, loading


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrappers_and_prefixes(tmp_path, wrapper):
    source, target = Head(), Head()
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    if wrapper:
        state = {"epoch": 3, wrapper: state, "arch": "x"}
    torch.save(state, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=wrapper is None)
    report = load_into(target, tmp_path / "w.pth.tar", what="decoder")
    assert same(target, values(source)) and report.ok
    assert (report.missing, report.unexpected, report.mismatched, report.dropped) == ([],) * 4
    assert sorted(report.matched) == sorted(target.state_dict())


def test_published_bookkeeping_is_dropped_and_half_precision_cast():
    source, target = Head().half(), Head()
    state = values(source)
    del state["cbr.1.num_batches_tracked"]
    for name in ("_tmp_running_mean", "_tmp_running_var", "_running_iter"):
        state[f"cbr.1.{name}"] = torch.ones(7)
    report = load_into(target, state, what="decoder", file="old.pth")
    assert len(report.dropped) == 3
    assert (report.missing, report.unexpected, report.file) == ([], [], "old.pth")
    for key, value in target.state_dict().items():
        assert value.dtype == (torch.int64 if "num_batches" in key else torch.float32)
        assert torch.equal(value, source.state_dict()[key].to(value.dtype))


@pytest.mark.parametrize(
    ("kind", "classifier"),
    [
        (
            Head,
            (
                "conv_last.weight",
                "conv_last.bias",
                "conv_last_deepsup.weight",
                "conv_last_deepsup.bias",
            ),
        ),
        (Pyramid, ("conv_last.4.weight", "conv_last.4.bias")),
    ],
)
def test_another_class_count_loads_all_but_the_classifier(kind, classifier):
    source, target = kind(num_class=150), kind(num_class=4)
    before = values(target)
    report = load_into(target, source.state_dict(), what="decoder")
    assert sorted(report.mismatched) == sorted(classifier)
    assert report.missing == []
    assert same(target, values(source), but=classifier)
    assert all(torch.equal(target.state_dict()[k], before[k]) for k in classifier)
    assert "another number of classes" in str(report)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *((kind, "width", r"w\.pth.*differ in shape.*MODEL\.fc_dim") for kind in (Head, Pyramid)),
        (Head, "nan", "cbr.1.running_var"),
        (Head, "names", "no tensor name matches.*fc.weight.*cbr.0.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(kind, change, message):
    target = kind(width=3)
    before = values(target)
    state = values(kind(width=2 if change == "width" else 3))
    if change == "nan":
        state["cbr.1.running_var"][0] = float("nan")
    elif change == "names":
        state = {"fc.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        load_into(target, state, what="decoder", file="w.pth")
    assert same(target, before)


def test_missing_and_left_over_are_reported_and_logged(caplog):
    state = values(Head())
    del state["cbr.0.weight"]
    state |= {f"extra{i}.weight": torch.ones(1) for i in range(7)}
    with caplog.at_level(logging.INFO, logger="mit_semseg"):
        report = load_into(Head(), state, what="decoder", file="w.pth")
    assert report.missing == ["cbr.0.weight"]
    assert len(report.unexpected) == 7
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    line = caplog.records[0].getMessage()
    assert line == (
        "decoder from w.pth: 9 tensors matched, 1 missing (cbr.0.weight), 7 unexpected "
        "(extra0.weight, extra1.weight, extra2.weight, extra3.weight, extra4.weight, ...)"
    )


def test_a_full_match_is_an_info_and_nothing_is_printed(monkeypatch, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="mit_semseg"):
        load_into(Head(), Head().state_dict(), what="decoder", file="w.pth")
    assert [r.levelname for r in caplog.records] == ["INFO"]
    capsys.readouterr()
    monkeypatch.setattr(loading, "logger", logging.Logger("without handlers"))
    state = Head().state_dict()
    load_into(Head(), state, what="decoder", file="w.pth")
    assert capsys.readouterr() == ("", "")
    load_into(Head(), {k: state[k] for k in list(state)[1:]}, what="decoder", file="w.pth")
    out, err = capsys.readouterr()
    assert not out and "1 missing" in err


def test_strict_refuses_what_is_missing_or_differs():
    state = values(Head())
    del state["cbr.0.weight"]
    target = Head()
    before = values(target)
    with pytest.raises(ValueError, match="1 missing"):
        load_into(target, state, what="decoder", strict=True)
    assert same(target, before)
    with pytest.raises(ValueError, match="number of classes"):
        load_into(target, Head(num_class=9).state_dict(), what="decoder", strict=True)
