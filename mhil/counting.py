"""What a network costs: its parameters and its multiply-adds."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

Tree = dict[str, Any]


def count_parameters(params: Tree) -> int:
  """Counts the numbers in a tree of arrays, or of their shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
  """Counts the multiply-adds of one call, without running it.

  Convolutions and matrix products count, and nothing else. A loop's body
  counts as often as `lax.scan` runs it, and once where that is unknown.

  Args:
    function: any traceable function, for instance a branch's `apply`.
    *arguments: its array arguments, or `jax.ShapeDtypeStruct` for them.
  """
  return _jaxpr_multiply_adds(jax.make_jaxpr(function)(*arguments).jaxpr)


def used_numbers(function: Callable[..., Any], params: Tree, *rest: Any) -> int:
  """Counts the numbers of `params` that a function of them reads.

  Args:
    function: any traceable function, for instance a branch's `apply`.
    params, *rest: its arguments, or `jax.ShapeDtypeStruct` for them.
  """
  jaxpr = jax.make_jaxpr(function)(params, *rest).jaxpr
  used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
  inputs = jaxpr.invars[: len(jax.tree.leaves(params))]
  return sum(math.prod(x.aval.shape) for x in inputs if id(x) in used)


def _jaxpr_multiply_adds(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    out, kind = equation.outvars[0].aval.shape, equation.primitive.name
    if kind == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
      total += math.prod(out) * math.prod(kernel) // features
    elif kind == "dot_general":
      (axes, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += math.prod(out) * math.prod(left[i] for i in axes)
    else:
      bodies = jax.extend.core.jaxprs_in_params(equation.params)
      once = sum(_jaxpr_multiply_adds(body) for body in bodies)
      total += once * equation.params.get("length", 1)
  return total
