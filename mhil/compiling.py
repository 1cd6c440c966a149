"""How often XLA compiles: counted from its own events, not assumed."""

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def count() -> int:
  """Programs compiled, or read from the cache, since this module loaded."""
  return _count


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
  del duration_secs, kwargs
  global _count
  _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)
