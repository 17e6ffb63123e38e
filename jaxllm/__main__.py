# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxllm`."""

import sys

from jaxllm.cli import main

sys.exit(main())
