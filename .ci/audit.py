# SPDX-License-Identifier: Apache-2.0
"""A software bill of materials of an environment, and an audit of its packages.

    make audit

Writes sbom.json (CycloneDX). Exits with status 1 if a package has a known vulnerability that
ACCEPTED does not name. If the database cannot be reached in TRIES attempts, the audit does not take
place; a warning says so, and the status is 0, since that is no fault of the packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

# {id of a vulnerability that does not concern jaxllm: why}
ACCEPTED: dict[str, str] = {}
TRIES, PAUSE = 4, 30  # attempts to reach the database, and seconds between them
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|Timeout|ProxyError|SSLError|Max retries|"
    r"[Ff]ailed to connect|Temporary failure in name resolution|5\d\d Server Error"
)


def bill(python: str, file: Path) -> int:
    """Writes the packages of the environment of an interpreter; returns their number."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", python, "--of", "JSON"]
    command += ["--output-reproducible", "--pyproject", "pyproject.toml", "--output-file", file]
    subprocess.run(command, check=True)
    return len(json.loads(file.read_text())["components"])


def pip_audit(command: list[str]) -> tuple[int, str, str]:
    """(status, report, log) of pip-audit, run again while it does not reach the database."""
    for left in reversed(range(TRIES)):
        done = subprocess.run(command, capture_output=True, text=True)
        if left and not done.stdout.strip() and UNREACHABLE.search(done.stderr):
            print(f"the database cannot be reached; again in {PAUSE} s", flush=True)
            time.sleep(PAUSE)
        else:
            break
    return done.returncode, done.stdout, done.stderr


def verdict(status: int, report: str, log: str) -> tuple[int, list[str]]:
    """(exit status, lines) of what pip-audit returned and wrote."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        why = log.strip().splitlines()[-1:] or [f"pip-audit ended with status {status}"]
        if UNREACHABLE.search(log):
            lines = [f"warning: the database cannot be reached: {why[0]}"]
            return 0, [*lines, f"THE AUDIT DID NOT TAKE PLACE, in {TRIES} attempts"]
        return 1, [f"pip-audit failed: {why[0]}"]
    found = [
        f"{one['name']} {one['version']}: {problem['id']}, fixed in "
        f"{', '.join(problem['fix_versions']) or 'no version'}"
        for one in packages
        for problem in one.get("vulns", ())
        if not {problem["id"], *problem.get("aliases", ())} & ACCEPTED.keys()
    ]
    skipped = [
        f"not audited: {p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p
    ]
    audited = len(packages) - len(skipped)
    lines = [*skipped, *found, f"{audited} packages audited, {len(found)} vulnerabilities"]
    return int(bool(found)), lines


def main() -> int:
    python = sys.argv[1]
    print(f"sbom.json: {bill(python, Path('sbom.json'))} packages")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--path",
        folder.stdout.strip(),
        "--format",
        "json",
    ]
    command += ["--vulnerability-service", "osv", "--progress-spinner", "off", "--skip-editable"]
    command += ["--timeout", "20"]
    status, lines = verdict(*pip_audit(command))
    print(*lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
