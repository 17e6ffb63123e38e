# SPDX-License-Identifier: Apache-2.0
"""What `make audit` says of a report of pip-audit."""

import json
import runpy
import sys
from pathlib import Path

AUDIT = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "audit.py"))
CLEAN = {"name": "jax", "version": "0.10.0", "vulns": []}
HURT = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": ["CVE-1"], "description": ""}


def verdict(packages, status=1, log=""):
    report = json.dumps({"dependencies": packages, "fixes": []}) if packages else ""
    return AUDIT["verdict"](status, report, log)


def test_a_vulnerability_fails_the_audit_unless_it_is_accepted(monkeypatch):
    packages = [CLEAN, {"name": "a", "version": "1.0", "vulns": [HURT]}]
    status, lines = verdict(packages)
    assert status == 1 and "a 1.0: PYSEC-1, fixed in 2.0" in lines
    monkeypatch.setitem(AUDIT["verdict"].__globals__["ACCEPTED"], "CVE-1", "not called")
    assert verdict(packages)[0] == 0


def test_packages_without_vulnerabilities_pass():
    skipped = {"name": "jaxllm", "skip_reason": "is editable"}
    status, lines = verdict([CLEAN, skipped], 0)
    assert status == 0 and lines[-1] == "1 packages audited, 0 vulnerabilities"
    assert any("jaxllm: is editable" in line for line in lines)


def test_a_database_that_cannot_be_reached_is_a_warning_and_another_failure_is_none():
    status, lines = verdict(None, 1, "ERROR:pip_audit._cli:Max retries exceeded with url: /v1")
    assert status == 0 and lines[0].startswith("warning: the database cannot be reached: ERROR")
    assert "DID NOT TAKE PLACE" in lines[1]
    assert verdict(None, 1, "TypeError: a bug")[0] == 1
    assert verdict(None, 1)[0] == 1


def test_a_database_that_cannot_be_reached_is_asked_again(tmp_path, monkeypatch, capsys):
    """Until it answers, or TRIES times; another failure is not repeated."""
    monkeypatch.setitem(AUDIT["pip_audit"].__globals__, "PAUSE", 0)
    count = tmp_path / "count"
    count.touch()
    for failures, message, calls in ((1, "Timeout", 2), (9, "Timeout", 4), (9, "TypeError", 1)):
        count.write_text("")
        code = f"""if True:
            import sys
            with open({str(count)!r}, "a+") as file:
                file.write("x")
                file.seek(0)
                done = len(file.read())
            if done <= {failures}:
                sys.exit("{message}")
            print("{{}}")
        """
        status, report, log = AUDIT["pip_audit"]([sys.executable, "-c", code])
        assert len(count.read_text()) == calls
        assert (status, report.strip()) == ((0, "{}") if calls == 2 else (1, ""))
        assert (message in log) == bool(status)
    assert capsys.readouterr().out.count("again in") == 4
