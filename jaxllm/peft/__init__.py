# SPDX-License-Identifier: Apache-2.0
"""What is trained beside a frozen model: a method is a file, and a row in interop.METHODS."""
