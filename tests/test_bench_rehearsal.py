"""The suite `rehearsal` on sizes that take no time."""

import functools

import pytest

from experiments import bench_rehearsal, benchmark, measure
from experiments.rehearsal_steps import Setup

TINY = Setup(4, b=4, c=1, r=2)


@functools.cache
def alone():
  sizes = {4: (200, 3000)}
  return bench_rehearsal.alone([TINY], (1, 2), sizes, repetitions=2)


class TestAlone:
  def test_a_line_for_every_size_and_device(self):
    found = [(row["devices"], row["size"]) for row in alone().rows]
    assert found == [(1, 200), (1, 3000), (2, 200), (2, 3000)]
    assert all(set(alone().columns) <= set(row) for row in alone().rows)
    assert all(row["draw_ms"] > 0 < row["store_ms"] for row in alone().rows)

  def test_what_is_moved_is_what_is_stated(self):
    for row in alone().rows:
      assert row["moved"] == row["wanted"] + row["padding"]
      assert row["all_to_all"] == (row["devices"] > 1)
    last = alone().rows[-1]
    # 2 rows of 4 x 4 x 3 bytes, from each of 2 devices.
    assert (last["wanted"], last["padding"]) == (96, 96)
    assert "2 programs on several devices 2 move" in alone().reading[-1]

  def test_memory_does_not_grow(self):
    first, second, third, last = (row["temporary"] for row in alone().rows)
    assert first == second and third == last
    assert "differs by 0 bytes" in alone().reading[0]

  def test_markdown(self):
    assert measure.markdown(alone()).count("\n| 4 |") == 4


@pytest.mark.slow
def test_a_whole_step():
  table = bench_rehearsal.whole([(Setup(8, b=4, c=1, r=2), 2)], (1, 2), 200)
  assert [row["devices"] for row in table.rows] == [1, 2]
  most = max(row["growth"] for row in table.rows)
  assert f"costs {100 * (most - 1):.1f} %" in table.reading[0]


@pytest.mark.slow
def test_the_part_for_accelerators(tmp_path):
  where = tmp_path / "trace"
  tiny = Setup(8, b=4, c=1, r=2)
  table = bench_rehearsal.overlap(tiny, 200, 3, str(where))
  assert list(where.rglob("*.xplane.pb"))
  (row,) = table.rows
  assert row["plain"] > 0 < row["ours"] and str(where) in table.note
  assert bench_rehearsal.overlap().rows == []


def test_suite():
  assert benchmark.SUITES["rehearsal"].devices == 8
