# SPDX-License-Identifier: Apache-2.0
"""`jaxllm doctor`: what is wrong with a machine or a run, and what to do.

`sections.examine` runs each section in a process of its own, so that a device, a file system or a
library that hangs or crashes is one problem among others. Nothing of jax is imported here.
"""
