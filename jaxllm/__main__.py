# SPDX-License-Identifier: Apache-2.0
import sys

from jaxllm.cli import main

sys.exit(main())
