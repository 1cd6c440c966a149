"""Inside `shard_map`: over which mesh axes does a value differ?"""

import jax
from jax import lax


def varying(x: jax.Array) -> frozenset[str]:
  """The mesh axes over which `x` is marked to differ."""
  return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, *axes: str) -> jax.Array:
  """`x`, marked to differ over `axes` too; no data move."""
  missing = tuple(sorted(set(axes) - varying(x)))
  return lax.pcast(x, missing, to="varying") if missing else x
