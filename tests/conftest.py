"""Simulated devices, checked shapes, shared fixtures."""

import functools
import gc
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Many tests compile the same program. A folder for each process of the tests,
# since JAX does not write its entries at once, and none for what is killed: see
# `program.environment`.
COMPILED = tempfile.mkdtemp(prefix="mhil-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook("mhil", "beartype.beartype")

# The system lets a process map some 65,000 pieces of memory, compiled programs
# take hundreds each, and XLA ends in a segmentation fault where none is left.
MOST_MAPPED = 25_000


@pytest.fixture(autouse=True, scope="module")
def programs_are_given_back():
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") < MOST_MAPPED:
    return
  for name, module in list(sys.modules.items()):
    if name.startswith("tests."):
      for held in list(vars(module).values()):
        if isinstance(held, functools._lru_cache_wrapper):
          held.cache_clear()
  import jax

  jax.clear_caches()
  gc.collect()


def pytest_unconfigure():
  shutil.rmtree(COMPILED, ignore_errors=True)
