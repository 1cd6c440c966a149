"""Slots, what is stored in them, and their way to other workers."""

import dataclasses

import jax
import numpy as np
import pytest

from mhil import buffer, compiling, moving, sharding
from tests import rehearsing
from tests.test_choose import words

SIZES = [(40, 5, 1), (41, 5, 2), (23, 7, 4), (100, 9, 8), (12, 12, 8)]


def capacities(layout, n):
  """Slots `[w, g]` when `n` classes have come, dealt one at a time.

  As many to each class, one more to the first; those of class k to the workers
  from the last but k on downwards.
  """
  groups = layout.groups
  n = {"per_class": groups, "balanced": n, "reservoir": 1}[layout.policy]
  out = np.zeros((layout.workers, groups), int)
  for rank in range(n):
    share = len(range(rank, layout.size, n))
    for k in range(share):
      out[(-1 - rank - k) % layout.workers, rank] += 1
  return out


class TestLayout:
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  @pytest.mark.parametrize("size, classes, w", SIZES)
  def test_slots_are_dealt_and_none_serves_two(self, policy, size, classes, w):
    layout = buffer.layout(policy, size, classes, w)
    assert layout.slots == buffer.slots_for(policy, size, classes, w)
    for n in range(1, classes + 1):
      want = capacities(layout, n)
      rank = np.arange(layout.groups)
      if policy == "balanced":
        rank = np.where(rank < n, rank, -1)
      seen = (rank >= 0).sum()
      room = buffer.portions(size, rank, seen, w)
      assert room.tolist() == want.tolist()
      assert room.sum() == size
      worker, slot = buffer.filled(layout, room, rank)
      assert len(set(zip(worker, slot))) == size
      assert slot.min() >= 0 and slot.max() < layout.slots

  @pytest.mark.parametrize("size, classes, w", SIZES)
  def test_a_share_never_grows(self, size, classes, w):
    layout = buffer.layout("balanced", size, classes, w)
    for n in range(1, classes):
      before, after = (capacities(layout, k)[:, :n] for k in (n, n + 1))
      assert (before >= after).all()

  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_few_slots_more_than_needed(self, policy):
    layout = buffer.layout(policy, 10_001, 100, 8)
    assert layout.slots <= 10_001 / 8 + 8

  def test_bad_input(self):
    with pytest.raises(ValueError, match=r"policy='all' is not known.*balanc"):
      buffer.layout("all", 10, 2, 1)
    for policy in "per_class", "balanced":
      with pytest.raises(
        ValueError, match=r"memory.size=9 rows.*10 cl.*use memory.size=10"
      ):
        buffer.layout(policy, 9, 10, 1)
    with pytest.raises(ValueError, match=r"use memory.size=1 or more"):
      buffer.layout("reservoir", 0, 10, 1)


@dataclasses.dataclass
class Model:
  """What each worker holds, by lists, a sample at a time."""

  layout: buffer.Layout
  candidates: int

  def __post_init__(self):
    w, g = self.layout.workers, self.layout.groups
    self.held = [[[] for _ in range(g)] for _ in range(w)]
    self.came = list(range(g)) if self.layout.policy != "balanced" else []
    self.seen = [0] * w

  def store(self, label, number, counted, key):
    if self.layout.policy == "reservoir":
      label = np.zeros_like(label)
    if self.layout.policy == "balanced":
      for c in label[counted].tolist():
        if c not in self.came:
          self.came.append(c)
    by_rank = capacities(self.layout, len(self.came)).tolist()
    room = [
      {c: by_rank[i][k] for k, c in enumerate(self.came)}
      for i in range(self.layout.workers)
    ]
    for i, own in enumerate(self.held):
      for c in self.came:
        del own[c][room[i][c] :]
    slot_key, keep_key = jax.random.split(key)
    slots, keeps = words(slot_key, label.shape), words(keep_key, label.shape)
    for i, j in np.argwhere(counted):
      c = int(label[i, j])
      self.one(i, c, number[i, j], room[i][c], slots[i, j], keeps[i, j])

  def one(self, i, c, number, room, slot, keep):
    own, b = self.held[i][c], rehearsing.kit().b
    t, self.seen[i] = self.seen[i], self.seen[i] + 1
    if len(own) < room:
      own.append(number)
    elif self.layout.policy == "reservoir":
      if (place := slot * (t + 1) >> 64) < room:
        own[place] = number
    elif room and keep * b >> 64 < self.candidates:
      own[slot * room >> 64] = number

  def numbers(self):
    return [
      int(number)
      for c in range(self.layout.groups)
      for own in self.held
      for number in own[c]
    ]


def stream(kit, steps, seed=0):
  """Mini-batches of a stream whose classes come in a mixed order."""
  rng = np.random.default_rng(seed)
  order = rng.permutation(kit.layout.classes)
  for step in range(steps):
    late = 1 + step * len(order) // steps
    early = max(0, late - 3)
    label = order[rng.integers(early, late, (kit.w, kit.b))]
    number = step * kit.w * kit.b + np.arange(kit.w * kit.b)
    counted = rng.random(label.shape) < 0.9
    yield label, number.reshape(label.shape), counted


class TestStore:
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  @pytest.mark.parametrize("w, c", [(1, 3), (4, 3), (4, 7)])
  def test_row_by_row_as_the_model(self, policy, w, c):
    kit = rehearsing.kit(policy, 43, 6, w, c=c)
    model, held, labels = Model(kit.layout, c), kit.empty(), {}
    with jax.numpy_rank_promotion("raise"):
      for step, (label, number, counted) in enumerate(stream(kit, 24)):
        key = jax.random.key(step)
        labels |= dict(zip(number[counted].tolist(), label[counted].tolist()))
        held = kit.store(held, kit.offer(label, number, counted), key)
        model.store(label, number, counted, key)
        found, kept = rehearsing.contents(kit.layout, held)
        assert kept == model.numbers()
        assert found == [labels[n] for n in kept]
        assert np.asarray(held.seen).tolist() == model.seen

  def test_one_program_whatever_classes_come(self):
    kit = rehearsing.kit("balanced", 43, 6, 4)
    held, compiled = kit.empty(), set()
    keys = list(jax.random.split(jax.random.key(0), 24))
    for key, batch in zip(keys, stream(kit, 24)):
      held = kit.store(held, kit.offer(*batch), key)
      compiled.add(compiling.count())
    assert len(compiled) == 1

  def test_the_stream_fills_replaces_and_evicts(self):
    """The control: a stream that shows nothing would pass the model too."""
    kit = rehearsing.kit("balanced", 43, 6, 4)
    held, before, replaced, left = kit.empty(), [], 0, 0
    for step, batch in enumerate(stream(kit, 24)):
      held = kit.store(held, kit.offer(*batch), jax.random.key(step))
      kept = rehearsing.contents(kit.layout, held)[1]
      gone = len(set(before) - set(kept))
      replaced += gone if len(kept) >= len(before) else 0
      left += gone if len(kept) < len(before) else 0
      before = kept
    assert replaced > 10 and left > 10

  @pytest.mark.slow
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  def test_no_collective_and_nothing_that_grows(self, policy):
    small, large = (
      rehearsing.kit(policy, size, 5, 4).store for size in (1_000, 100_000)
    )
    kit = rehearsing.kit(policy, 1_000, 5, 4)
    batch = kit.offer(*next(stream(kit, 1)))
    found = []
    for program, size in (small, 1_000), (large, 100_000):
      held = rehearsing.kit(policy, size, 5, 4).empty()
      compiled = program.lower(held, batch, jax.random.key(0)).compile()
      assert sharding.collectives(compiled, kit.mesh) == []
      found.append(compiled.memory_analysis())
      assert found[-1].alias_size_in_bytes >= sum(
        x.addressable_shards[0].data.nbytes for x in held[:3]
      )
    assert found[0].temp_size_in_bytes == found[1].temp_size_in_bytes

  def test_c_of_b_are_candidates(self):
    """Of a full class, c of b samples replace a row, in the mean."""
    kit = rehearsing.kit("per_class", 400, 1, 1)
    held, steps = kit.with_fill([[400]]), 300
    label = np.zeros((1, 7), int)
    stored = 0
    for step in range(steps):
      number = 1000 + 7 * step + np.arange(7)[None]
      held = kit.store(held, kit.offer(label, number), jax.random.key(step))
      stored += np.isin(number, np.asarray(held.number)).sum()
    # Binomial(2100, 3/7), less the few that met in one slot of 400.
    assert abs(stored - 3 * steps) < 5 * np.sqrt(2100 * 12 / 49) + 4

  def test_float_rows(self):
    kit = rehearsing.kit("per_class", 40, 5, 1)
    held = kit.empty((3,), np.float32)
    rows = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
    label, number = np.arange(7)[None] % 5, np.arange(7)[None]
    offer = kit.offer(label, number, rows=rows)
    held = kit.store(held, offer, jax.random.key(0))
    at = buffer.filled(kit.layout, *map(np.asarray, held[3:5]))
    kept = np.asarray(held.rows)[at]
    assert (kept == rows[0][np.asarray(held.number)[at]]).all()


class TestReshard:
  @pytest.mark.parametrize("policy", buffer.POLICIES)
  @pytest.mark.parametrize("way", [(4, 1), (1, 4), (4, 3), (3, 4)])
  @pytest.mark.parametrize("steps", [1, 24])
  def test_no_row_is_lost_and_the_order_stays(self, policy, way, steps):
    kits = [rehearsing.kit(policy, 43, 6, w) for w in way]
    held = kits[0].empty()
    for step, batch in enumerate(stream(kits[0], steps)):
      held = kits[0].store(held, kits[0].offer(*batch), jax.random.key(step))
    old, new = (kit.layout for kit in kits)
    moved = moving.reshard(held, old, new)
    assert rehearsing.contents(new, moved) == rehearsing.contents(old, held)
    assert moved.seen.sum() == np.asarray(held.seen).sum()
    assert [x.dtype for x in moved] == [x.dtype for x in held]

    # What has moved goes on as what has not.
    placed, kit = buffer.place(moved, kits[1].mesh), kits[1]
    assert jax.tree.map(jax.typeof, placed) == jax.tree.map(
      jax.typeof, kit.empty()
    )
    label, number, counted = next(stream(kit, 1, seed=1))
    offer = kit.offer(label, 5000 + number, counted)
    rehearsing.contents(new, kit.store(placed, offer, jax.random.key(0)))

  def test_too_small(self):
    kit = rehearsing.kit("per_class", 40, 5, 1)
    held = kit.with_fill([[8, 8, 8, 3, 0]])
    new = buffer.layout("per_class", 30, 5, 2)
    message = (
      r"memory\.size=30 cannot hold all 27 rows of the buffer, as 6 find no "
      r"slot of their class; use memory\.size=40"
    )
    with pytest.raises(ValueError, match=message):
      moving.reshard(held, kit.layout, new)
    larger = buffer.layout("per_class", 43, 5, 3)
    moved = moving.reshard(held, kit.layout, larger)
    assert rehearsing.contents(larger, moved)[1] == list(range(1, 28))

  def test_another_policy(self):
    kit = rehearsing.kit("per_class", 40, 5, 1)
    new = buffer.layout("reservoir", 40, 5, 1)
    with pytest.raises(ValueError, match=r"policy=reservoir.*per_class"):
      moving.reshard(kit.empty(), kit.layout, new)


class TestWiden:
  """More classes than were planned, for as many workers."""

  @pytest.mark.parametrize("policy", ["balanced", "reservoir"])
  @pytest.mark.parametrize("w", [1, 3])
  @pytest.mark.parametrize("steps", [1, 24])
  def test_as_if_they_had_been_planned(self, policy, w, steps):
    few, many = (rehearsing.kit(policy, 43, c, w) for c in (6, 9))
    held, planned = few.empty(), many.empty()
    for step, batch in enumerate(stream(few, steps)):
      key = jax.random.key(step)
      held = few.store(held, few.offer(*batch), key)
      planned = many.store(planned, many.offer(*batch), key)
    wide = moving.widen(held, few.layout, many.layout)
    for name, x, y in zip(wide._fields, wide, planned):
      assert x.dtype == y.dtype and np.array_equal(x, y), name
    # The control: there is something to widen.
    assert policy == "reservoir" or held.fill.shape != planned.fill.shape

  @pytest.mark.parametrize("w", [1, 3])
  def test_a_class_keeps_as_many_rows_as_it_has_slots(self, w):
    few, many = (rehearsing.kit("per_class", 43, c, w) for c in (6, 9))
    held = few.empty()
    for step, batch in enumerate(stream(few, 6)):
      held = few.store(held, few.offer(*batch), jax.random.key(step))
    wide = moving.widen(held, few.layout, many.layout)
    share = np.array([5] * 7 + [4] * 2)
    counts = np.pad(np.asarray(held.fill).sum(0), (0, 3))
    assert (counts > share).any() and (counts < share)[:6].any()
    assert wide.fill.sum(0).tolist() == np.minimum(counts, share).tolist()
    was, now = (
      list(zip(*rehearsing.contents(kit.layout, x)))
      for kit, x in ((few, held), (many, wide))
    )
    assert set(now) <= set(was) and len(now) == wide.fill.sum()
    # What was widened goes on like any other buffer.
    placed = buffer.place(wide, many.mesh)
    label, number, counted = next(stream(many, 1, seed=1))
    offer = many.offer(label, 5000 + number, counted)
    rehearsing.contents(
      many.layout, many.store(placed, offer, jax.random.key(0))
    )

  @pytest.mark.parametrize(
    "other",
    [("per_class", 40, 4, 1), ("per_class", 41, 6, 1), ("balanced", 40, 6, 1)],
  )
  def test_bad(self, other):
    kit = rehearsing.kit("per_class", 40, 5, 1)
    message = r"5 classes does not go on with \d; use more, and the same mem"
    with pytest.raises(ValueError, match=message):
      moving.widen(kit.empty(), kit.layout, buffer.layout(*other))

  def test_rows_are_those_that_stand_first_on_all_workers(self):
    layouts = [buffer.layout("per_class", 12, c, 2) for c in (2, 4)]
    mesh = sharding.make_mesh(data=2)
    blank = buffer.init(layouts[0], (1,), np.uint8, mesh)
    held = jax.tree.map(np.array, blank)
    # Class 0: one worker has four rows, the other none. Class 1: full.
    fill = np.array([[3, 3], [0, 3]], np.int32)
    at = buffer.filled(layouts[0], fill, held.rank)
    held.number[at] = np.arange(1, 10)
    held.label[at] = np.repeat([0, 1], [3, 6])
    held.rows[at] = held.number[at][:, None]
    wide = moving.widen(held._replace(fill=fill), *layouts)
    at = buffer.filled(layouts[1], wide.fill, wide.rank)
    assert wide.label[at].tolist() == [0, 0, 0, 1, 1, 1]
    # None of three is lost though a worker has room for two; of six, the
    # first place of both and the second of one.
    number = wide.number[at].tolist()
    assert number[:3] == [1, 2, 3]
    assert {4, 7} < set(number[3:]) and number[-1] != 9
    assert wide.rows[at][:, 0].tolist() == number
    assert wide.fill.sum(0).tolist() == [3, 3, 0, 0]
