# SPDX-License-Identifier: Apache-2.0
"""What each process of tests/test_cluster.py runs: the training commands of a JSON file, one by
one, in one process, which saves starting it again."""

import json
import sys

from jaxllm.cli import main

for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    if status:
        sys.exit(status)
