# SPDX-License-Identifier: Apache-2.0
"""Arithmetic whose form depends on the platform; the only room that knows one."""
