"""Comparisons of local learning: numbers of modules, contexts, controls."""

from typing import Any

from experiments.rows import RATE_0, Row

# Pieces of ResNet-14 after which a module ends, by the number of modules.
CUTS = {2: (3,), 4: (1, 3, 5), 7: (0, 1, 2, 3, 4, 5)}


def _fashion(mode: str, k: int) -> Row:
  fields = {"local.mode": mode, "local.cuts": CUTS[k]}
  return Row(
    f"{mode}, {k} modules", "local_fashion", fields, {"modules": k}, mode
  )


def _encoders(mode: str, k: int) -> Row:
  """The control: what encoders add to a network that no cut parts."""
  name = f"end to end with the encoders of {mode}"
  fields = {"local.mode": mode, "local.cuts": CUTS[k], "local.isolated": False}
  return Row(f"{name}, {k}", "local_fashion", fields, {"modules": k}, name)


FASHION = [
  Row(
    "end to end",
    "local_fashion",
    {"local.cuts": (), "local.mode": "R0"},
    bound="end to end",
  ),
  # In two modules R1E is E: a cut's second encoder would see the image again.
  *(
    _fashion(mode, k)
    for k in (7, 4, 2)
    for mode in ("R0", "R1E", "E")
    if (mode, k) != ("R1E", 2)
  ),
  *(_encoders(mode, k) for k in (7, 4) for mode in ("E", "R1E")),
  Row("E, 7 modules, learning rate 0 (control)", "local_fashion", RATE_0),
]

GREEDY: dict[str, Any] = {"local.mode": "R0", "local.classifier": "0c1f"}
METHODS: dict[str, dict[str, Any]] = {
  "greedy 0c1f": GREEDY,
  "DGL": {"local.mode": "R0"},
  "E": {"local.mode": "E"},
  "R1E": {"local.mode": "R1E"},
}


def _cifar(label: str, k: int, fields: dict[str, Any], **drawn: Any) -> Row:
  fields = fields | {"local.modules": k}
  return Row(label, "local_cifar10_resnet32_k16", fields, **drawn)


# The published recipe, for a GPU: what says most comes first.
CIFAR10 = [
  _cifar("end to end", 1, {"local.mode": "R0"}, bound="end to end"),
  *(
    _cifar(f"{name}, {k} modules", k, fields, at={"modules": k}, curve=name)
    for k in (16, 4, 8)
    for name, fields in METHODS.items()
  ),
  *(
    _cifar(
      f"end to end with the encoders of {name}, 16",
      16,
      METHODS[name] | {"local.isolated": False},
    )
    for name in ("E", "R1E")
  ),
]
