"""The suite `serving` at the size of a toy."""

import functools

from experiments import bench_serving, measure
from tests import test_bench_scale


@functools.cache
def made():
  return bench_serving.answers(
    test_bench_scale.SMALL, (1, 3), repetitions=2, at_once=8
  )


def test_every_network_is_asked_in_each_way():
  found = [(r["how"], r["heads"], r["devices"]) for r in made().rows]
  assert found == [
    ("of the run", 1, 1),
    ("exported", 1, 1),
    ("of the run", 3, 1),
    ("of the run", 3, 2),
    ("exported", 3, 1),
  ]


def test_numbers_follow_from_each_other():
  for row in made().rows:
    assert 0 < row["ms"] <= row["worst"]
    many = 1e3 / row["rate"] / row["heads"]
    assert abs(row["head_ms"] / many - 1) < 0.05


def test_it_says_what_more_heads_cost():
  reading = made().reading
  assert reading[0].startswith("Network of the run, one device: from 1 to 3")
  assert any("3 heads over 2 simulated devices" in line for line in reading)
  text = measure.markdown(made())
  assert "images a second, 8 at once" in text
