"""Simulated devices, checked shapes, shared fixtures."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jaxtyping

jaxtyping.install_import_hook("mhil", "beartype.beartype")
