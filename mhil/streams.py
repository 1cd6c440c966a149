"""What arrives when: class-incremental protocols and class orders.

A stream deals the classes of a data set into tasks, task after task along
one class order. Task `t` opens head `t`; a class's column inside its head is
its place in the task. A fixed network has one head instead, in which a class's
column is its place in the order. The names of protocols are the field's: "B0"
cuts all classes into equal tasks, "B50 with 5 steps" begins with 50 classes and
adds the rest in five equal tasks.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Stream(NamedTuple):
  """The tasks of a stream.

  Attributes:
    tasks: original class ids of each task, in the order of arrival.
    fixed: one head has the classes of all tasks.
  """

  tasks: tuple[tuple[int, ...], ...]
  fixed: bool = False

  @property
  def order(self) -> tuple[int, ...]:
    """Original class ids in the order of arrival."""
    return tuple(c for task in self.tasks for c in task)

  @property
  def sizes(self) -> tuple[int, ...]:
    """Classes of each task."""
    return tuple(len(task) for task in self.tasks)

  @property
  def by_task(self) -> "Stream":
    """The same tasks with a head each, as tests tell of them."""
    return Stream(self.tasks)

  @property
  def heads(self) -> tuple[tuple[int, ...], ...]:
    """Original class ids of each head, in the order of its columns."""
    return (self.order,) if self.fixed else self.tasks

  @property
  def head_width(self) -> int:
    """Classes of the largest head, to which every head is padded."""
    return max(map(len, self.heads))

  @property
  def head_of(self) -> np.ndarray:
    """Head of each original class: `[classes]` int32."""
    head = np.empty(len(self.order), np.int32)
    for i, classes in enumerate(self.heads):
      head[list(classes)] = i
    return head

  @property
  def column_of(self) -> np.ndarray:
    """Column of each original class inside its head: `[classes]` int32."""
    column = np.empty(len(self.order), np.int32)
    for classes in self.heads:
      column[list(classes)] = np.arange(len(classes))
    return column

  @property
  def class_of(self) -> np.ndarray:
    """Original class of each head's columns: `[heads, width]`, -1 if none."""
    table = np.full((len(self.heads), self.head_width), -1)
    for i, classes in enumerate(self.heads):
      table[i, : len(classes)] = classes
    return table

  def newest(self, t: int) -> int:
    """The head of task `t`."""
    return 0 if self.fixed else t

  def seen(self, t: int) -> tuple[int, ...]:
    """Original class ids that have arrived once task `t` is over."""
    if not 0 <= t < len(self.tasks):
      raise ValueError(
        f"t={t} is not a task of this stream; use 0 to {len(self.tasks) - 1}"
      )
    return Stream(self.tasks[: t + 1]).order


def class_incremental(
  classes: int,
  *,
  increment: int | None = None,
  base: int | None = None,
  order: Sequence[int] | np.ndarray | None = None,
  order_seed: int | None = 0,
  sizes: Sequence[int] | np.ndarray | None = None,
  fixed: bool = False,
) -> Stream:
  """Deals `classes` into tasks of `increment` classes along one class order.

  `class_incremental(100, increment=10)` is B0 with ten tasks,
  `class_incremental(100, base=50, increment=10)` is B50 with five steps.

  Args:
    classes: number of classes of the data set, with ids from 0.
    increment: classes of each task. Unused where `sizes` is given.
    base: classes of the first task; None makes it as large as the others.
    order: class ids in the order of arrival, a permutation of `0..classes-1`.
    order_seed: where `order` is None, the order is
      `numpy.random.RandomState(order_seed).permutation(classes)`, the rule of
      the field's toolboxes (their usual seed is 1993); None keeps `0, 1, ..`.
    sizes: classes of each task, for unequal tasks.
    fixed: one head for the classes of all tasks, see `Stream`.

  Returns:
    The stream.

  Raises:
    ValueError: if tasks do not add up to the classes, or `order` is not a
      permutation. A remainder is refused, not dealt to a smaller last task.
  """
  if classes < 1:
    raise ValueError(
      f"classes={classes} leaves nothing to learn; use 1 or more"
    )
  if sizes is None:
    sizes = _equal_sizes(classes, increment, base)
  elif base is not None:
    raise ValueError(
      f"stream.base={base} contradicts stream.sizes; make it the first of the "
      "sizes and leave base out"
    )
  sizes = tuple(int(size) for size in sizes)
  _check_sizes(classes, sizes)
  ids = _class_order(classes, order, order_seed)
  ends = np.cumsum(sizes)
  tasks = tuple(ids[end - size : end] for size, end in zip(sizes, ends))
  return Stream(tasks, fixed)


def _equal_sizes(
  classes: int, increment: int | None, base: int | None
) -> tuple[int, ...]:
  if increment is None or increment < 1:
    raise ValueError(
      f"stream.increment={increment} makes no tasks; use 1 or more, or give "
      "stream.sizes"
    )
  if base is not None and not 1 <= base <= classes:
    raise ValueError(
      f"stream.base={base} does not fit the {classes} classes; use 1 to "
      f"{classes}"
    )
  first = () if base is None else (base,)
  rest = classes - sum(first)
  if rest % increment:
    raise ValueError(_remainder_message(classes, increment, base))
  return first + (increment,) * (rest // increment)


def _remainder_message(classes: int, increment: int, base: int | None) -> str:
  rest = classes - (base or 0)
  after = f" after stream.base={base}" if base else ""
  sizes = (base,) * bool(base) + (increment,) * (rest // increment)
  sizes += (rest % increment,)
  shown = repr(sizes) if len(sizes) <= 8 else "(...)"
  fits = max(i for i in range(1, min(increment, rest) + 1) if rest % i == 0)
  return (
    f"stream.increment={increment} does not divide the {rest} classes{after}; "
    f"use stream.sizes={shown} or increment={fits}"
  )


def _check_sizes(classes: int, sizes: tuple[int, ...]) -> None:
  if not sizes or min(sizes) < 1:
    raise ValueError(
      f"stream.sizes={sizes} has a task without classes; use 1 or more each"
    )
  if sum(sizes) != classes:
    raise ValueError(
      f"stream.sizes={sizes} add up to {sum(sizes)}, not to the {classes} "
      f"classes; change a size by {classes - sum(sizes):+d}"
    )


def _class_order(
  classes: int,
  order: Sequence[int] | np.ndarray | None,
  order_seed: int | None,
) -> tuple[int, ...]:
  if order is not None:
    ids = tuple(int(c) for c in order)
    _check_order(classes, ids)
    return ids
  if order_seed is None:
    return tuple(range(classes))
  # The legacy generator: its permutations are what published orders mean.
  drawn = np.random.RandomState(order_seed).permutation(classes)
  return tuple(drawn.tolist())


def _check_order(classes: int, ids: tuple[int, ...]) -> None:
  given, wanted = Counter(ids), set(range(classes))
  faults = {
    "missing": wanted - given.keys(),
    "repeated": {c for c, times in given.items() if times > 1},
    "unknown": given.keys() - wanted,
  }
  told = [f"{name} {_some(bad)}" for name, bad in faults.items() if bad]
  if told:
    raise ValueError(
      f"stream.order={short(ids)} is no permutation of 0..{classes - 1}: "
      f"{'; '.join(told)}; name every class once"
    )


def short(ids: tuple[int, ...]) -> str:
  """The first of them, as a line has room for."""
  return str(ids) if len(ids) <= 8 else f"({str(ids[:8])[1:-1]}, ..)"


def _some(ids: set[int], limit: int = 5) -> str:
  shown = ", ".join(str(c) for c in sorted(ids)[:limit])
  more = len(ids) - limit
  return f"{shown} and {more} more" if more > 0 else shown
