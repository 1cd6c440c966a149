"""What heads ask of a device is known before anything is compiled."""

import optax
import pytest

from mhil import room, sharding
from tests import tiny

TOLD = "network.widths=(8,)"
# Kernels and biases of 4 to 8 to 3 units in float32; Adam holds two more of
# each and a counter.
HEAD = 3 * 4 * (4 * 8 + 8 + 8 * 3 + 3) + 4


def check(free, where="host", **axes):
  how = tiny.objective(), optax.scale_by_adam(), 4, TOLD
  room.check_heads(sharding.make_mesh(**axes), *how, (free, where))


@pytest.mark.parametrize("axes, copies", [({}, 1), ({"data": 2}, 2)])
def test_heads_and_their_optimiser_are_counted(axes, copies):
  check(4 * copies * HEAD, **axes)
  with pytest.raises(ValueError, match=r"^network\.widths=\(8,\) .*; use a"):
    check(4 * copies * HEAD - 1, **axes)


def test_simulated_heads_are_all_on_the_host():
  check(4 * HEAD, head=4)
  with pytest.raises(ValueError, match=f"{4 * HEAD:,} bytes on the host"):
    check(HEAD, head=4)


@pytest.mark.parametrize(
  "axes, share",
  [({}, 4), ({"head": 2}, 2), ({"head": 3}, 2), ({"data": 4}, 4)]
  + [({"subnet": 2}, 2), ({"stage": 2, "head": 2}, 1)],
)
def test_a_device_has_its_share(axes, share):
  check(share * HEAD, "device", **axes)
  with pytest.raises(ValueError, match="bytes on each device"):
    check(share * HEAD - 1, "device", **axes)


def test_the_host_is_asked_for_what_it_has_free():
  how = optax.scale_by_adam(), 10**15, TOLD
  with pytest.raises(ValueError, match="bytes on the host"):
    room.check_heads(sharding.make_mesh(), tiny.objective(), *how)
