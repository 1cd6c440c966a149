"""A step of layer-parallel stages, phase by phase; see `abreast`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mhil import coupling, programs, stages
from mhil.bank import Bank

Name = tuple[str, int]
# What stages are to do side by side: `{(program, stage): its arguments}`.
Jobs = Mapping[Name, tuple[Any, ...]]


class Banks(NamedTuple):
  """The state of all stages.

  Attributes:
    trunks: pieces of each stage.
    nets: the network that guesses, of each stage but the first.
  """

  trunks: tuple[Bank, ...]
  nets: tuple[Bank, ...]


class _Held(NamedTuple):
  """What stages have in a step, by their numbers."""

  trunks: list[Any]
  nets: list[Any]
  flights: list[Any]
  states: list[Any]
  multipliers: list[Any]
  pulls: list[Any]
  values: list[Any]
  adjoints: list[Any]
  learnt: list[Any]


def names(method: coupling.Method, count: int) -> list[Name]:
  """The programs of a step of `count` stages, in the order of first use."""
  phases = coupling.timetable(method, count)
  used = [(name, k) for phase in phases for k, name in phase.items()]
  return [("begin", 0), *dict.fromkeys(used)]


def step(
  work: Callable[[Jobs], Mapping[Name, Any]],
  meshes: Sequence[Mesh],
  method: coupling.Method,
  send: Callable[[Any, Mesh], Any] = lambda tree, mesh: stages.send(tree, mesh),
) -> Callable[..., programs.State]:
  """`(state, epoch, task, samples) -> state`, with `Banks` in the state.

  Args:
    work: does the jobs of a phase and returns what each made; need not wait.
    meshes: of each stage.
    method: whose timetable.
    send: moves what one stage made to another's mesh.
  """
  timetable = coupling.timetable(method, len(meshes))

  def take(state, epoch, task, samples):
    given = state.step, state.memory, epoch, task, samples
    memory, flight = work({("begin", 0): given})["begin", 0]
    flights = [send(flight, here) for here in meshes]
    nets = [None, *state.bank.nets]
    blank = [[None] * len(meshes) for _ in range(6)]
    held = _Held(list(state.bank.trunks), nets, flights, *blank)
    for phase in timetable:
      made = work(
        {
          (what, k): _given(held, what, k, meshes, send)
          for k, what in phase.items()
        }
      )
      for k, what in phase.items():
        _keep(held, what, k, made[what, k], meshes, send)
    banks = Banks(tuple(held.trunks), tuple(held.nets[1:]))
    return programs.State(state.step + 1, banks, memory)

  return take


def _given(held, what, k, meshes, send):
  """What a stage's program takes; of neighbours, sent to its devices."""
  if what == "guess":
    return held.nets[k].params, held.flights[k]
  if what == "learn":
    return held.nets[k], held.flights[k], held.states[k], held.learnt[k]
  if what == "mend":
    below = send(held.values[k - 1], meshes[k])
    return held.states[k], held.multipliers[k], held.adjoints[k], below
  own = held.trunks[k], held.flights[k], held.states[k]
  if what == "sweep":
    return own
  above = held.states[k + 1] if k + 1 < len(meshes) else None
  return *own, send(above, meshes[k]), held.pulls[k]


def _keep(held, what, k, made, meshes, send):
  if what == "guess":
    held.states[k], held.multipliers[k] = made
    held.pulls[k - 1] = send(made[1], meshes[k - 1])
  elif what == "learn":
    held.nets[k] = made
  elif what == "mend":
    held.states[k], held.learnt[k] = made
  elif what == "sweep":
    held.states[k + 1] = send(made, meshes[k + 1])
  else:
    held.trunks[k], held.values[k], held.adjoints[k] = made
