"""The report of the machine comes even when parts of the installation are broken."""

from __future__ import annotations

import sys

from fastem import env
from fastem.env import collect_env, versions


def test_report_has_all_sections_and_no_failures_here():
    report = collect_env()
    assert list(report) == ["software", "processor", "devices", "backends"]
    assert report["software"]["torch"][0].isdigit()
    broken = {name: text for section in report.values() for name, text in section.items() if text.startswith("broken")}
    assert not set(broken) - {"triton kernels", "driver"}, broken


def test_report_survives_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import raises
    report = collect_env()
    assert report["devices"]["CUDA devices"].startswith("broken: ModuleNotFoundError")
    assert report["software"]["python"].startswith(sys.version.split()[0])


def test_report_survives_a_section_that_raises(monkeypatch):
    def broken():
        raise OSError("no such thing\nsecond line")

    monkeypatch.setitem(env._SECTIONS, "processor", broken)
    assert collect_env()["processor"] == {"error": "broken: OSError: no such thing"}


def test_broken_backend_is_told_not_raised(monkeypatch):
    monkeypatch.setenv("FASTEM_BACKEND", "nonsense")
    assert "nonsense" in collect_env()["backends"]["backend"]


def test_versions_are_those_installed():
    import numpy

    assert versions()["numpy"] == numpy.__version__
