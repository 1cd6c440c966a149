"""Draws: which rows, how likely, and what is moved for them."""

import collections
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import buffer, drawing, exchange, moving, rehearsal, sharding
from mhil import room as room_lib
from mhil import run as run_lib
from mhil.sharding import Collective
from tests import rehearsing, tiny
from tests.test_buffer import stream
from tests.test_choose import far


def whole(drawn):
  """Labels and numbers of a draw in the order of drawing, -1 for missing."""
  drawn = jax.tree.map(np.asarray, drawn)
  there = drawn.weight == 1
  assert ((drawn.weight == 0) == ~there).all()
  assert (rehearsing.numbers(drawn.rows)[there] == drawn.number[there]).all()
  n = len(drawn.order)
  assert sorted(drawn.order) == list(range(n))
  label, number = np.full(n, -1), np.full(n, -1)
  label[drawn.order[there]] = drawn.label[there]
  number[drawn.order[there]] = drawn.number[there]
  return label, number


def keys(count, seed=0):
  return list(jax.random.split(jax.random.key(seed), count))


# Filled rows of 5 classes on 4 workers with 40 slots: of the second and the
# third task of the paper, in small. Five classes do not divide into 4 workers.
FILLS = {
  "partly": [
    [2, 1, 0, 0, 0],
    [1, 2, 0, 0, 0],
    [2, 2, 1, 0, 0],
    [0, 1, 1, 0, 0],
  ],
  "full": [[2] * 5] * 4,
  "one class": [[2, 0, 0, 0, 0]] * 4,
  "one worker": [[0] * 5, [2] * 5, [0] * 5, [0] * 5],
  "one class is rare": [[2, 2, 2, 0, 0]] * 3 + [[2, 2, 2, 0, 1]],
}


class TestUniform:
  DRAWS = 3000

  def counts(self, kit, held, total):
    """How often each row was drawn, in all and by the first worker."""
    drawn = kit.draws(held, jax.random.split(jax.random.key(0), self.DRAWS))
    there, number = np.asarray(drawn.weight) == 1, np.asarray(drawn.number)
    n = number.shape[1]
    # No draw repeats a row, and none is short of rows that there are.
    sample = np.where(there, number, -np.arange(n))
    assert (np.diff(np.sort(sample, 1), axis=1) > 0).all()
    assert (there.sum(1) == min(total, n)).all()

    def count(found, counted):
      return np.bincount(found[counted], minlength=total + 1)[1:]

    part = slice(n // kit.w)
    return count(number, there), count(number[:, part], there[:, part])

  @pytest.mark.parametrize("state", FILLS)
  def test_every_filled_row_is_as_likely(self, state):
    kit = rehearsing.kit(w=4, r=1)
    held = kit.with_fill(FILLS[state])
    total = np.sum(FILLS[state])
    drawn, first = self.counts(kit, held, total)
    p = 4 / total
    assert far(drawn, self.DRAWS * p, self.DRAWS * p * (1 - p)) < 5
    # Whoever owns a row, it goes to any worker.
    p = 1 / total
    assert far(first, self.DRAWS * p, self.DRAWS * p * (1 - p)) < 5

  def test_a_reservoir_that_is_partly_filled(self):
    kit = rehearsing.kit("reservoir", w=4, r=1)
    drawn, _ = self.counts(kit, kit.with_fill([[3], [10], [0], [6]]), 19)
    p = 4 / 19
    assert far(drawn, self.DRAWS * p, self.DRAWS * p * (1 - p)) < 5

  def test_the_released_rule_would_be_found_out(self):
    """The control: a class by an index modulo the seen ones, then a row.

    Three of five classes are seen, as many rows of each; the index runs over
    all five, so classes 0 and 1 get two fifths each.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(24)
    for _ in range(self.DRAWS):
      group = rng.integers(0, 5, 4) % 3
      drawn += np.bincount(group * 8 + rng.integers(0, 8, 4), minlength=24)
    p = 4 / 24
    assert far(drawn, self.DRAWS * p, self.DRAWS * p * (1 - p)) > 50


class TestMissing:
  @pytest.mark.parametrize("total", [0, 1, 3, 15, 16, 17])
  @pytest.mark.parametrize("w", [1, 4])
  def test_exactly_those_that_are_not_there(self, total, w):
    kit = rehearsing.kit("reservoir", 40, 5, w, r=16 // w)
    fill = buffer.dealt(np.array([total]), np.zeros(1, int), w)
    held = kit.with_fill(fill)
    for key in keys(5):
      drawn = kit.draw(held, key)
      label, number = whole(drawn)
      there = min(total, 16)
      assert (number[:there] > 0).all() and (number[there:] == -1).all()
      assert len(set(number[:there])) == there
      assert float(drawn.weight.sum()) == there
      counts = np.bincount(label[:there], minlength=5)
      assert counts.sum() == there
      # What is missing is missing on all workers alike.
      each = np.asarray(drawn.weight).reshape(w, -1).sum(1)
      assert each.max() - each.min() <= 1

  def test_of_a_worker_alone(self):
    kit = rehearsing.kit("reservoir", 40, 5, 4, r=4, scope="local")
    held = kit.with_fill([[0], [3], [4], [10]])
    for key in keys(5):
      drawn = jax.tree.map(np.asarray, kit.draw(held, key))
      assert drawn.weight.reshape(4, 4).sum(1).tolist() == [0, 3, 4, 4]
      number = np.where(drawn.weight == 1, drawn.number, -1).reshape(4, 4)
      assert set(number[1]) - {-1} == {1, 2, 3}
      assert set(number[2]) == {4, 5, 6, 7}
      assert set(number[3]) <= set(range(8, 18)) and len(set(number[3])) == 4
      whole(drawn)
    drawn = kit.draws(held, jax.random.split(jax.random.key(1), 1000))
    counts = np.bincount(np.asarray(drawn.number)[:, 12:].ravel())[8:]
    assert far(counts, 400, 1000 * 0.4 * 0.6) < 5


class TestMeshes:
  @pytest.mark.slow
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_same_draws_on_any_number_of_workers(self, policy):
    """Only keys and rows count, not where the rows lie."""
    start = rehearsing.kit(policy, 64, 6, 8, r=2)
    held = start.empty()
    for step, batch in enumerate(stream(start, 12)):
      held = start.store(held, start.offer(*batch), jax.random.key(step))
    found = []
    for w in 8, 4, 2, 1:
      kit = rehearsing.kit(policy, 64, 6, w, r=16 // w)
      moved = moving.reshard(held, start.layout, kit.layout)
      moved = buffer.place(moved, kit.mesh)
      found.append([np.stack(whole(kit.draw(moved, k))) for k in keys(3)])
    for other in found[1:]:
      np.testing.assert_array_equal(found[0], other)
    assert len({f[1].tobytes() for f in found[0]}) == 3  # keys count

  def test_along_data_alone(self):
    """Every head sees the same draw; nothing crosses `head`."""
    kit = rehearsing.kit(w=2, r=4, head=2)
    held = kit.with_fill([[2] * 5] * 2)
    drawn = kit.draw(held, jax.random.key(0))
    whole(drawn)
    plain = rehearsing.kit(w=2, r=4)
    want = plain.draw(plain.with_fill([[2] * 5] * 2), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, drawn, want)
    compiled = kit.draw.lower(held, jax.random.key(0)).compile()
    (one,) = sharding.collectives(compiled, kit.mesh)
    assert (one.kind, one.axes) == ("all-to-all", ("data",))


def audit(kit, program, shape=rehearsing.SHAPE):
  """The program, compiled for a buffer and a batch of such rows."""
  held = kit.empty(shape)
  label = np.zeros((kit.w, kit.b), int)
  rows = np.zeros((*label.shape, *shape), np.uint8)
  offer = kit.offer(label, label, rows=rows)
  inputs = (held, jax.random.key(0))
  if program is not kit.draw:
    inputs = (held, offer, jax.random.key(0))
  return program.lower(*inputs).compile()


class TestTraffic:
  @pytest.mark.slow
  @pytest.mark.parametrize("w", [2, 8])
  @pytest.mark.parametrize("chunk", [None, 1])
  def test_one_all_to_all_of_the_stated_bytes(self, w, chunk):
    kit = rehearsing.kit(size=400, w=w, r=6, chunk=chunk)
    stated = drawing.traffic(kit.layout, 2, count=6, chunk=chunk)
    assert stated.wanted == 6 * 2
    assert stated.padding == (w * (chunk or 6) - 6) * 2
    want = [Collective("all-to-all", sum(stated), ("data",))]
    for program in kit.draw, kit.both:
      assert sharding.collectives(audit(kit, program), kit.mesh) == want

  @pytest.mark.slow
  def test_none_on_one_worker_and_none_with_a_local_scope(self):
    for w, scope in (1, "global"), (4, "local"):
      kit = rehearsing.kit(w=w, scope=scope)
      assert sharding.collectives(audit(kit, kit.both), kit.mesh) == []
      stated = drawing.traffic(kit.layout, 2, count=4, scope=scope)
      assert stated == (0, 0)

  def test_few_slots_need_little_room(self):
    """A worker with 5 slots cannot send 6 rows to each of 8 workers."""
    layout = buffer.layout("reservoir", 40, 5, 8)
    assert drawing.traffic(layout, 10, count=5) == (50, 30)

  @pytest.mark.slow
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_memory_does_not_grow_with_the_buffer(self, policy):
    """Neither the buffer nor a table of its slots is copied."""
    found = []
    for size in 1_000, 50_000:
      kit = rehearsing.kit(policy, size, 5, 4)
      found.append(audit(kit, kit.both, (16,)).memory_analysis())
      part = kit.layout.slots * 16 + 2 * 4 * 4 * kit.layout.slots
      assert found[-1].alias_size_in_bytes >= part
    assert found[0].temp_size_in_bytes == found[1].temp_size_in_bytes

  @pytest.mark.parametrize("fill", ["full", "one worker", "partly"])
  def test_chunks_bring_the_same_rows(self, fill):
    want, some = (rehearsing.kit(w=4, r=3, chunk=n) for n in (None, 1))
    held = want.with_fill(FILLS[fill])
    for key in keys(5):
      for a, b in zip(whole(want.draw(held, key)), whole(some.draw(held, key))):
        np.testing.assert_array_equal(a, b)


class TestDeal:
  @pytest.mark.parametrize("w", [2, 3, 8])
  def test_equal_parts_in_turn(self, w):
    """Plans of all workers fit together, whatever was drawn from whom."""
    r, rng = 5, np.random.default_rng(w)
    deal = jax.jit(
      jax.vmap(exchange.deal, (None, None, None, 0)), static_argnums=1
    )
    for kind in range(12):
      owner = rng.integers(0, w + 1, r * w) if kind else np.zeros(r * w, int)
      owner = jnp.asarray(owner, jnp.int32)
      plan = deal(owner, w, jax.random.key(kind), jnp.arange(w))
      plan = jax.tree.map(np.asarray, plan)
      assert sorted(plan.mine.ravel()) == list(range(r * w))
      has = np.bincount(owner, minlength=w + 1)[:w]
      assert (plan.most == np.ceil(has / w).max()).all()
      for i in range(w):
        for draw, whose, entry in zip(
          plan.mine[i], plan.owner[i], plan.entry[i]
        ):
          if owner[draw] < w:
            assert whose == owner[draw]
            assert 0 <= entry < plan.most[i]
            assert plan.send[whose, i, entry] == draw

  def test_each_worker_is_as_likely_to_be_first(self):
    owner = jnp.array([0, 1, 1, 1])
    deal = jax.vmap(exchange.deal, (None, None, 0, None))
    some = jax.random.split(jax.random.key(0), 400)
    first = deal(owner, 2, some, jnp.int32(0)).mine[:, 0]
    assert abs(np.sum(np.asarray(first) == 0) - 200) < 5 * 10


class TestChunk:
  @pytest.mark.parametrize("count, w", [(7, 8), (56, 8), (7, 64), (56, 128)])
  def test_is_seldom_too_small(self, count, w):
    slots, row = 1000, 2**22
    chunk = exchange.chunk_for(count, slots, w, row)
    assert chunk is not None and 2 * chunk <= count
    rng = np.random.default_rng(count + w)
    drawn = rng.multivariate_hypergeometric([slots] * w, count * w, 20_000)
    # At most 1 in 1000 is promised: 20 of 20,000, and 5 deviations of it.
    assert (drawn.max(1) > chunk * w).sum() <= 20 + 5 * np.sqrt(20)

  def test_none_where_it_gains_little(self):
    assert exchange.chunk_for(7, 1000, 8, 3072) is None  # 172 kB in all
    assert exchange.chunk_for(7, 1000, 2, 2**30) is None  # 7 of 7 rows
    assert exchange.chunk_for(7, 16, 8, 2**30) is None  # 2 at most, anyway


class TestRehearse:
  @pytest.mark.slow
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_draws_before_it_stores(self, policy):
    """As `draw` and `store` in turn; samples of a step come in later draws."""
    kit = rehearsing.kit(policy, 43, 6, 4)
    held, apart = kit.empty(), kit.empty()
    with jax.numpy_rank_promotion("raise"):
      for key, batch in zip(keys(10), stream(kit, 10)):
        draw_key, store_key = jax.random.split(key)
        want = whole(kit.draw(apart, draw_key))
        apart = kit.store(apart, kit.offer(*batch), store_key)
        held, drawn = kit.both(held, kit.offer(*batch), key)
        np.testing.assert_array_equal(whole(drawn), want)
        assert not set(batch[1].ravel()) & set(want[1])
        jax.tree.map(np.testing.assert_array_equal, held, apart)

  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_types_and_places_stay(self, policy):
    kit = rehearsing.kit(policy, 43, 6, 4)
    held = kit.empty()
    before = jax.tree.map(jax.typeof, held)
    after, drawn = kit.both(
      held, kit.offer(*next(stream(kit, 1))), jax.random.key(0)
    )
    assert jax.tree.map(jax.typeof, after) == before
    assert drawn.rows.shape == (16, *rehearsing.SHAPE)
    assert drawn.rows.sharding.spec[0] == "data"


class TestExpected:
  """What the prior correction is told of a draw: its mean over draws."""

  DRAWS = 2000

  @pytest.mark.parametrize("scope", ["global", "local"])
  @pytest.mark.parametrize("fill", FILLS)
  def test_is_the_mean_of_draws(self, scope, fill):
    kit = rehearsing.kit("per_class", 40, 5, 4, r=3, scope=scope)
    held = kit.with_fill(FILLS[fill])
    drawn = kit.draws(held, jax.random.split(jax.random.key(1), self.DRAWS))
    there = np.asarray(drawn.weight) == 1
    label = np.where(there, np.asarray(drawn.label), 5)
    mean = np.bincount(label.ravel(), minlength=6)[:5] / self.DRAWS
    stated = rehearsal.expected(kit.layout, held, jnp.zeros(5, int), 12, scope)
    # A class's number in a draw deviates by less than 2: five times its mean's.
    np.testing.assert_allclose(mean, stated, atol=5 * 2 / self.DRAWS**0.5)
    assert float(stated.sum()) == pytest.approx(there.sum() / self.DRAWS)

  def test_of_a_reservoir_by_what_came(self):
    kit = rehearsing.kit("reservoir", 40, 5, 4, r=2)
    held = kit.with_fill([[3], [10], [0], [6]])
    offered = jnp.array([30, 10, 0, 0, 0])
    stated = rehearsal.expected(kit.layout, held, offered, 8, "global")
    np.testing.assert_allclose(stated, [6, 2, 0, 0, 0], rtol=1e-6)

  @pytest.mark.slow
  def test_belongs_to_the_rows_that_a_step_trains_on(self):
    """Not to those that the step draws for the next one."""
    run = tiny.build()
    state, told = run_lib.start(run), []
    for count in range(1, 5):
      state = tiny.steps(run, run_lib.start(run), 0, count)
      memory = jax.tree.map(np.asarray, state.memory)
      told.append((memory.expected.sum(), memory.drawn.weight.sum()))
    # The first step stores, the second draws of what it stored.
    assert told[0] == (0, 0) and told[1] == (4, 4)
    assert all(a == pytest.approx(b) for a, b in told)


GOOD = {"size": 40, "batch": 28, "draws": 16, "candidates": 12}


class TestCheck:
  DATASET = types.SimpleNamespace(
    train_images=np.zeros((100, 2, 2, 1), np.uint8), classes=5
  )

  def make(self, **changed):
    mesh = sharding.make_mesh(data=4)
    how = {**GOOD, "policy": "per_class", **changed}
    return rehearsal.transform(mesh, self.DATASET, **how)

  def test_good(self):
    for c, r in (0, 4), (28, 40):
      made = self.make(candidates=c, draws=r)
      assert made.added == r
    assert made.facts["bytes"] == 40 * 4

  @pytest.mark.parametrize(
    "wrong, message",
    [
      ({"candidates": 32}, r"memory\.candidates=32 are not 0 to 28.*s=4$"),
      ({"candidates": -4}, r"memory\.candidates=-4 are not 0 to 28"),
      ({"candidates": 6}, r"memory\.candidates=6 .*mesh\.data=4; use 8"),
      ({"draws": 44}, r"memory\.draws=44 rows.*1 to 40.*memory\.draws=40"),
      ({"draws": 0}, r"memory\.draws=0 rows.*use memory\.draws=4"),
      ({"draws": 7}, r"memory\.draws=7 .*mesh\.data=4; use 8"),
      ({"draws": 39, "size": 39}, r"memory\.draws=39 .*; use 36"),
      ({"draws": 43, "size": 39}, r"memory\.draws=43 .*use memory\.draws=36"),
      ({"scope": "near"}, r"memory\.scope='near' is not known; use global or"),
      ({"selection": "best"}, r"memory\.selection='best' .* or herding"),
      ({"policy": "fair"}, r"memory\.policy='fair' .*balanced"),
      ({"size": 4}, r"memory\.size=4 rows .* of 5 classes; .*=5 or more"),
      (
        {"policy": "reservoir", "selection": "herding"},
        r"memory\.selection=herding .*use memory\.policy=balanced",
      ),
    ],
  )
  def test_bad(self, wrong, message):
    with pytest.raises(ValueError, match=message):
      self.make(**wrong)

  @pytest.mark.parametrize(
    "where, room, fix",
    [
      ("device", 10_000, "use memory.size=400 or less, or mesh.data=10 or"),
      ("device", 0, "available; use smaller images, or memory.size=0 for none"),
      ("host", 10_000, "use memory.size=100 or less$"),
      ("host", 0, "available; use smaller images, or memory.size=0 for none"),
    ],
  )
  def test_rows_that_do_not_fit(self, where, room, fix):
    """Says how many bytes are asked and available, and what would fit."""
    layout = buffer.layout("reservoir", 1000, 5, 4)
    asked = {
      "device": "25,000 bytes on each of 4",
      "host": "100,000 bytes on the",
    }
    told = f"memory.size=1000 rows of 100 bytes ask for {asked[where]} .*{fix}"
    with pytest.raises(ValueError, match=told):
      room_lib.check_room(layout, 100, room, where)
    room_lib.check_room(
      layout, 100, {"device": 25_000, "host": 100_000}[where], where
    )

  @pytest.mark.parametrize("where", ["device", "host"])
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_what_is_proposed_fits(self, policy, where):
    """And is the most, or the fewest, that does."""
    told = collections.Counter()

    def fits(size, workers, room):
      layout = buffer.layout(policy, size, classes, workers)
      try:
        room_lib.check_room(layout, 3, room, where)
      except ValueError as error:
        return dict(
          re.findall(r"(memory\.size|mesh\.data)=(\d+) or", str(error))
        )
      return None

    grid = itertools.product((1, 3, 7), (1, 2, 3, 4), (7, 31), range(0, 90, 4))
    for classes, w, size, room in grid:
      fixes = fits(size, w, room) or {}
      if "memory.size" in fixes:
        most = int(fixes["memory.size"])
        assert fits(most, w, room) is None, (classes, w, size, room)
        assert fits(most + 1, w, room) is not None
      if "mesh.data" in fixes:
        fewest = int(fixes["mesh.data"])
        assert fits(size, fewest, room) is fits(size, fewest + 1, room) is None
        assert fits(size, fewest - 1, room) is not None
      told.update(fixes.keys())
    assert told["memory.size"] > 20
    assert (told["mesh.data"] > 20) == (where == "device")

  def test_fewer_workers_than_can_hold_the_rows(self, monkeypatch):
    """A save of four workers is refused on two, before it is read."""
    monkeypatch.setattr(
      room_lib, "available", lambda mesh, place: (40, "device")
    )
    self.make()
    mesh = sharding.make_mesh(data=2)
    with pytest.raises(
      ValueError, match=r"each of 2 devices, where 40 are.*=4 or"
    ):
      rehearsal.transform(mesh, self.DATASET, **GOOD, policy="per_class")

  def test_rows_that_this_machine_does_not_hold(self):
    """The same by `transform`, before anything is allocated."""
    images = np.broadcast_to(np.uint8(0), (4, 4096, 4096, 3))
    dataset = types.SimpleNamespace(train_images=images, classes=5)
    mesh = sharding.make_mesh(data=4)
    with pytest.raises(ValueError, match=r"50,331,648 bytes ask for .* use"):
      rehearsal.transform(mesh, dataset, **GOOD | {"size": 10**6})
