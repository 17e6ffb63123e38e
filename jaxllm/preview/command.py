# SPDX-License-Identifier: Apache-2.0
"""The arguments of `jaxllm preview`. Slow imports wait until they are valid."""

from __future__ import annotations

from jaxllm.arguments import Parser, integer, run_config
from jaxllm.config import checks
from jaxllm.config.fields import home
from jaxllm.data.inputs import check_inputs
from jaxllm.errors import UserError
from jaxllm.paths import as_path


def run(parser: Parser, args: list[str]) -> None:
    """Prints a preview or writes its page."""
    parser.usage = (
        "jaxllm preview [CONFIG.yaml] [--objective VERB] [--key value ...]\n\n"
        "Shows the data of a run as the model will see it. Reads no weights and runs on the CPU.\n"
        "All arguments except the following belong to the run (`jaxllm sft --help`)."
    )
    flag = parser.flag
    about = "step whose rows are shown, from 1"
    flag("--step", about, type=integer(1), default=1, metavar="N")
    about = "rows to print; 0 = all"
    flag("--rows", about, type=integer(0), default=3, metavar="N")
    about = "examples of each set to check for near duplicates and suspicious text; 0 = all"
    flag("--limit", about, type=integer(0), default=20_000, metavar="N")
    about = "write a page with all rows instead [preview.html]"
    flag("--html", about, nargs="?", const="preview.html", type=home, metavar="FILE.html")
    options, words = parser.parse_known_args(args)
    if options.html:
        if not options.html.endswith(".html"):
            raise UserError(f"--html {options.html}: give the name of the page, FILE.html")
        from jaxllm.report.page import check_file

        check_file("--html", as_path(options.html))
    cfg = run_config(words)
    checks.check(cfg)
    check_inputs(cfg)
    from jaxllm.preview.reading import read_preview

    found = read_preview(cfg, options.step, options.limit)
    if options.html:
        from jaxllm.preview.page import write_page

        print(write_page(found, options.html))
    else:
        from jaxllm.preview.terminal import show

        show(found, options.rows)
