"""The mesh, placement, and the audit against programs of known traffic."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mhil import sharding
from mhil.sharding import Collective

P = jax.P
ALL = P(sharding.AXES)


def mesh8():
  return sharding.make_mesh(data=2, head=4)


def cube8():
  return sharding.make_mesh(data=2, head=2, stage=2)


def compile_local(f, mesh, shape=(8, 16), dtype=jnp.float32, out=ALL):
  """Compiles `f` of one row a device, under shard_map over the whole mesh."""
  with jax.set_mesh(mesh):
    x = sharding.place(jnp.ones(shape, dtype), mesh, ALL)
    g = jax.shard_map(f, in_specs=ALL, out_specs=out, check_vma=False)
    return jax.jit(g).lower(x).compile()


def audit_local(f, mesh, **options):
  return sharding.collectives(compile_local(f, mesh, **options), mesh)


def audit_line(line, mesh, header="HloModule hand_written"):
  text = f"{header}\n\nENTRY %main () -> f32[] {{\n  {line}\n}}\n"
  return sharding.collectives(text, mesh)


def ring(n):
  return [(i, (i + 1) % n) for i in range(n)]


# The mesh.


def test_mesh_always_has_the_four_explicit_axes():
  mesh = sharding.make_mesh()
  assert mesh.axis_names == ("data", "head", "stage", "subnet")
  assert mesh.devices.shape == (1, 1, 1, 1)
  assert mesh.axis_types == (jax.sharding.AxisType.Explicit,) * 4


def test_mesh_uses_the_first_devices_in_order():
  mesh = sharding.make_mesh(head=2, subnet=3)
  assert dict(mesh.shape) == {"data": 1, "head": 2, "stage": 1, "subnet": 3}
  assert list(mesh.devices.flat) == jax.devices()[:6]


def test_mesh_takes_devices_in_the_order_given():
  devices = [jax.devices()[i] for i in (5, 1, 7, 2, 0)]
  mesh = sharding.make_mesh(data=2, stage=2, devices=devices)
  assert [d.id for d in mesh.devices.flat] == [5, 1, 7, 2]


@pytest.mark.parametrize("axis", sharding.AXES)
@pytest.mark.parametrize("size", [0, -2, True])
def test_mesh_rejects_a_size_that_is_not_positive(axis, size):
  message = f"mesh.{axis}={size} is not a positive whole number; use mesh."
  with pytest.raises(ValueError, match=re.escape(message)):
    sharding.make_mesh(**{axis: size})


def test_mesh_larger_than_the_devices_says_how_to_get_more():
  message = (
    "mesh.data=2 x mesh.head=5 asks for 10 devices, 8 cpu devices are there; "
    "use a smaller axis or set XLA_FLAGS="
    "--xla_force_host_platform_device_count=10"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    sharding.make_mesh(data=2, head=5)
  with pytest.raises(
    ValueError, match=r"^mesh\.stage=2 asks for 2 devices, 1 "
  ):
    sharding.make_mesh(stage=2, devices=jax.devices()[:1])


def run_simulate(code, **env):
  """Runs `code` in a process of its own: jax reads the count only once."""
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | env
  code = (
    "import jax; from mhil import sharding\n"
    f"{code}\nprint(len(jax.devices('cpu')))"
  )
  root = os.path.dirname(os.path.dirname(__file__))
  command = [sys.executable, "-c", code]
  return subprocess.run(
    command, env=env, cwd=root, capture_output=True, text=True
  )


@pytest.mark.parametrize(
  "code, flags, found",
  [
    ("sharding.simulate(3)", "", 3),
    ("sharding.simulate(3); sharding.simulate(2)", "", 3),
    ("sharding.simulate(2)", "--xla_force_host_platform_device_count=5", 5),
    ("sharding.simulate(6)", "--xla_force_host_platform_device_count=5", 6),
  ],
)
def test_simulate_gives_at_least_what_was_asked(code, flags, found):
  done = run_simulate(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) == found


def test_simulate_after_jax_has_started():
  found = len(jax.devices())
  sharding.simulate(found)  # there are enough, so nothing to complain about
  message = (
    f"devices={found + 1}, but jax has started with {found}; simulate before "
    "the first use of jax, or set XLA_FLAGS="
    f"--xla_force_host_platform_device_count={found + 1}"
  )
  with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
    sharding.simulate(found + 1)
  with pytest.raises(ValueError, match="devices=0 is not positive"):
    sharding.simulate(0)


def test_place_and_replicated():
  mesh = mesh8()
  tree = {"a": np.arange(8.0).reshape(4, 2), "b": [jnp.ones((8, 3))]}
  placed = sharding.place(tree, mesh, P("head", None))
  assert placed["a"].sharding == jax.NamedSharding(mesh, P("head", None))
  assert placed["b"][0].addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(placed["a"], tree["a"])
  copies = sharding.replicated(tree, mesh)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(copies))
  assert len(copies["a"].sharding.device_set) == 8


# The audit on programs that say what they move. A device has [1, 16] floats.


def scatter(x, axis):
  return lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)


@pytest.mark.parametrize(
  "f, kind, size",
  [
    (lambda x: lax.psum(x, "head"), "all-reduce", 64),
    (lambda x: lax.pmax(x, "head"), "all-reduce", 64),
    (lambda x: lax.all_gather(x, "head"), "all-gather", 4 * 64),
    (lambda x: scatter(x, "head"), "reduce-scatter", 64 // 4),
    (
      lambda x: lax.all_to_all(x, "head", 1, 0, tiled=True),
      "all-to-all",
      64,
    ),
    (lambda x: lax.ppermute(x, "head", ring(4)), "collective-permute", 64),
    (lambda x: lax.ppermute(x, "head", [(0, 1)]), "collective-permute", 64),
  ],
)
def test_kind_bytes_and_axis(f, kind, size):
  assert audit_local(f, mesh8()) == [Collective(kind, size, ("head",))]


@pytest.mark.parametrize(
  "axes",
  [
    ("data",),
    ("head",),
    ("stage",),
    ("data", "head"),
    ("data", "stage"),
    ("stage", "data"),
    ("head", "stage"),
    ("data", "head", "stage"),
  ],
)
def test_axes_of_a_sum_and_of_a_gather(axes):
  ordered = tuple(a for a in sharding.AXES if a in axes)
  found = audit_local(lambda x: lax.psum(x, axes), cube8())
  assert found == [Collective("all-reduce", 64, ordered)]
  found = audit_local(lambda x: lax.all_gather(x, axes), cube8())
  assert found == [Collective("all-gather", 64 * 2 ** len(axes), ordered)]


@pytest.mark.parametrize("axis", ["data", "head", "stage"])
def test_axis_of_a_permutation(axis):
  found = audit_local(lambda x: lax.ppermute(x, axis, ring(2)), cube8())
  assert found == [Collective("collective-permute", 64, (axis,))]


def test_a_permutation_over_two_axes_can_stay_within_one():
  def f(x, pairs):
    return lax.ppermute(x, ("data", "head"), pairs)

  mesh = mesh8()
  (whole,) = audit_local(lambda x: f(x, ring(8)), mesh)
  (within,) = audit_local(lambda x: f(x, [(4, 5), (6, 7)]), mesh)
  assert whole.axes == ("data", "head")
  assert within.axes == ("head",)


@pytest.mark.parametrize("axes", ["stage", ("stage", "subnet")])
def test_a_sum_over_axes_of_size_one_moves_nothing(axes):
  mesh = mesh8()
  compiled = compile_local(lambda x: lax.psum(x, axes), mesh)
  # XLA keeps the instruction, so that it is the audit that leaves it out.
  assert " all-reduce(" in compiled.as_text()
  assert sharding.collectives(compiled, mesh) == []
  found = audit_local(lambda x: lax.psum(x, ("head", "stage")), mesh)
  assert found == [Collective("all-reduce", 64, ("head",))]


def test_one_device_moves_nothing():
  f = lambda x: lax.psum(x, sharding.AXES)  # noqa: E731
  assert audit_local(f, sharding.make_mesh()) == []


def test_a_permutation_onto_oneself_moves_nothing():
  pairs = [(i, i) for i in range(4)]
  assert audit_local(lambda x: lax.ppermute(x, "head", pairs), mesh8()) == []


def test_local_work_has_no_collectives():
  assert audit_local(lambda x: jnp.tanh(x) @ x.T, mesh8()) == []


def test_a_sum_over_heads_put_into_local_work_is_found():
  # The control: without it an audit that sees nothing would pass every test
  # of "no traffic over head".
  def f(x, link):
    loss = jnp.sum(jnp.tanh(x) ** 2, keepdims=True)
    return lax.psum(loss, "head") if link else loss

  mesh = mesh8()
  linked = audit_local(lambda x: f(x, True), mesh)
  assert linked == [Collective("all-reduce", 4, ("head",))]
  assert sharding.bytes_over(linked, "head") == 4
  assert (
    sharding.bytes_over(audit_local(lambda x: f(x, False), mesh), "head") == 0
  )


def test_inside_a_loop_counts_once():
  def f(x):
    def body(carry):
      return lax.psum(carry[0], "head") / 4, carry[1] + 1

    return lax.while_loop(lambda carry: carry[1] < 3, body, (x, 0))[0]

  assert audit_local(f, mesh8()) == [Collective("all-reduce", 64, ("head",))]


def test_inside_a_scan_and_a_branch():
  def f(x):
    def step(x, _):
      x = lax.cond(
        x[0, 0] > 0,
        lambda x: lax.ppermute(x, "data", ring(2)),
        lambda x: lax.psum(x, "head"),
        x,
      )
      return x, None

    return lax.scan(step, x, None, length=3)[0]

  assert sorted(audit_local(f, mesh8())) == [
    Collective("all-reduce", 64, ("head",)),
    Collective("collective-permute", 64, ("data",)),
  ]


def test_combined_sums_are_one_collective_with_all_the_bytes():
  def f(x):
    parts = x, jnp.sum(x), 2 * x[:, :3], x[:, :2].astype(jnp.int32)
    return sum(jnp.sum(part) for part in lax.psum(parts, "head")) * x

  found = audit_local(f, mesh8())
  # Whether XLA joins the integers to the floats is its own affair.
  assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("head",))}
  assert len(found) <= 2
  assert sharding.bytes_over(found, "head") == 64 + 4 + 12 + 8


def test_several_collectives():
  def f(x):
    x = lax.all_gather(x, "head", tiled=True)
    x = lax.ppermute(jnp.sin(x), "data", ring(2))
    return lax.psum(jnp.cos(x), ("data", "head"))

  found = audit_local(f, mesh8())
  assert sorted(found) == [
    Collective("all-gather", 256, ("head",)),
    Collective("all-reduce", 256, ("data", "head")),
    Collective("collective-permute", 256, ("data",)),
  ]
  assert sharding.bytes_over(found, "head") == 512
  assert sharding.bytes_over(found, "data") == 512
  assert sharding.bytes_over(found, "stage") == 0
  with pytest.raises(ValueError, match="axis='heads' is no mesh axis; use one"):
    sharding.bytes_over(found, "heads")


@pytest.mark.parametrize(
  "dtype, width",
  [(jnp.bool, 1), (jnp.int8, 1), (jnp.int16, 2), (jnp.complex64, 8)],
)
def test_dtypes_that_the_cpu_gathers_as_they_are(dtype, width):
  found = audit_local(lambda x: lax.all_gather(x, "head"), mesh8(), dtype=dtype)
  assert found == [Collective("all-gather", 4 * 16 * width, ("head",))]


@pytest.mark.parametrize("ids", [(5, 1, 7, 2), (7, 6, 5, 4)])
@pytest.mark.parametrize("axis", ["data", "head"])
def test_positions_in_the_mesh_count_and_not_device_ids(ids, axis):
  devices = [jax.devices()[i] for i in ids]
  mesh = sharding.make_mesh(data=2, head=2, devices=devices)
  found = audit_local(lambda x: lax.psum(x, axis), mesh, shape=(4, 16))
  assert found == [Collective("all-reduce", 64, (axis,))]
  found = audit_local(
    lambda x: lax.ppermute(x, axis, ring(2)), mesh, shape=(4, 16)
  )
  assert found == [Collective("collective-permute", 64, (axis,))]


# The audit on plain code, where XLA puts the collective in.


def audit_plain(f, mesh, *arrays):
  with jax.set_mesh(mesh):
    placed = [sharding.place(x, mesh, spec) for x, spec in arrays]
    return sharding.collectives(jax.jit(f).lower(*placed).compile(), mesh)


def test_a_contraction_over_a_cut_axis_is_a_sum():
  def f(x, w):
    return jnp.einsum("bd,df->bf", x, w, out_sharding=P("data", None))

  x = jnp.ones((8, 16)), P("data", "head")
  w = jnp.ones((16, 6)), P("head", None)
  found = audit_plain(f, mesh8(), x, w)
  assert found == [Collective("all-reduce", 4 * 6 * 4, ("head",))]


@pytest.mark.parametrize(
  "to, size, axis",
  [(P("data", None), 4 * 16 * 4, "head"), (P(None, "head"), 8 * 4 * 4, "data")],
)
def test_resharding_to_a_copy_is_a_gather(to, size, axis):
  x = jnp.ones((8, 16)), P("data", "head")
  found = audit_plain(lambda x: jax.reshard(x, to), mesh8(), x)
  assert found == [Collective("all-gather", size, (axis,))]


def test_a_gradient_over_cut_samples_is_a_sum_over_data_only():
  def f(w, x):
    loss = lambda w: jnp.sum(jnp.tanh(jnp.einsum("hbd,hdf->hbf", x, w)))  # noqa: E731
    return jax.grad(loss)(w)

  w = jnp.ones((4, 5, 3)), P("head")
  x = jnp.ones((4, 8, 5)), P("head", "data")
  found = audit_plain(f, mesh8(), w, x)
  assert found == [Collective("all-reduce", 5 * 3 * 4, ("data",))]


def test_a_softmax_over_cut_heads_needs_two_sums():
  x = jnp.ones((8, 16)), P("data", "head")
  found = audit_plain(jax.nn.log_softmax, mesh8(), x)
  assert found == [Collective("all-reduce", 4 * 4, ("head",))] * 2


def test_a_mesh_that_the_program_was_not_compiled_for():
  compiled = compile_local(lambda x: lax.psum(x, "head"), mesh8())
  with pytest.raises(ValueError, match="mesh has 4 devices, the program has 8"):
    sharding.collectives(compiled, sharding.make_mesh(head=4))


# The audit on lines by hand: forms that the CPU backend does not print.

SUM = "%r = f32[16]{0} all-reduce(%p), channel_id=1, "


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("head",)),
    ("{{0,1,2,3}, {4,5,6,7}}", ("head",)),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("{{0,4,1,5,2,6,3,7}}", ("data", "head")),
    ("{{0,1},{2,3},{4,5},{6,7}}", ("head",)),
    ("{{0,5},{1,4},{2,7},{3,6}}", ("data", "head")),
    ("{{0},{1},{2},{3},{4},{5},{6},{7}}", None),
    ("{}", ("data", "head")),
    ("[2,4]<=[8]", ("head",)),
    ("[1,8]<=[8]", ("data", "head")),
    ("[8,1]<=[8]", None),
    ("[4,2]<=[8]", ("head",)),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "head")),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("head",)),
    ("mesh['data'=2,'head'=4,'stage'=1,'subnet'=1] {'head'}", ("head",)),
    ("mesh['data'=2,'head'=4,'stage'=1,'subnet'=1] {'stage'}", None),
    ("mesh['data'=2,'head'=4,'stage'=1,'subnet'=1] {}", None),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
    ("mesh[axis_0=2,axis_1=4] {axis_0,axis_1}", ("data", "head")),
    ("mesh['data'=2,'head'=4] {'head':(2)2}", ("head",)),
    ("mesh['a'=8] {'a':(1)2}", ("data",)),
    ("mesh['a'=8] {'a':(2)4}", ("head",)),
    ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("data", "head")),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
    ("mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'b'}", ("head",)),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",)),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("head",)),
  ],
)
def test_every_way_to_write_groups(groups, axes):
  line = f"{SUM}replica_groups={groups}, use_global_device_ids=true"
  wanted = [] if axes is None else [Collective("all-reduce", 64, axes)]
  assert audit_line(line, mesh8()) == wanted


def test_groups_on_a_mesh_of_three_axes():
  found = audit_line(SUM + "replica_groups=[4,2]<=[2,2,2]T(0,2,1)", cube8())
  assert [c.axes for c in found] == [("head",)]
  found = audit_line(SUM + "replica_groups=[2,4]<=[2,2,2]T(1,0,2)", cube8())
  assert [c.axes for c in found] == [("data", "stage")]


HEADS = "replica_groups={{0,1,2,3},{4,5,6,7}}, "


@pytest.mark.parametrize(
  "shape, opcode, size",
  [
    ("f32[4,8]{1,0}", "all-reduce-start", 128),
    ("(f32[4,8]{1,0}, bf16[3]{0})", "all-reduce-start", 134),
    ("((f32[4]{0}), f32[4]{0}, u32[])", "all-reduce-start", 16),
    ("(f32[2]{0}, f32[8]{0})", "all-gather-start", 32),
    ("((f32[2]{0}, s8[1]), (f32[8]{0}, s8[4]))", "all-gather-start", 36),
    ("((f32[8]{0}), f32[2]{0})", "reduce-scatter-start", 8),
    ("((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[])", "reduce-scatter-start", 32),
    ("((f32[2], f32[2]), (f32[2], f32[2]), s32[])", "all-to-all-start", 16),
    ("((bf16[6,2], s32[4]), bf16[6,2])", "ragged-all-to-all-start", 24),
    ("((u32[8]{0}), u32[8]{0})", "collective-broadcast-start", 32),
  ],
)
def test_asynchronous_pairs_count_once_and_the_result_only(shape, opcode, size):
  kind = opcode.removesuffix("-start")
  lines = (
    f"%s = {shape} {opcode}(%p), channel_id=1, {HEADS}dimensions={{0}}\n"
    f"  %u = {shape} {kind}-update(%s)\n"
    f"  ROOT %d = f32[8]{{0}} {kind}-done(%u)"
  )
  assert audit_line(lines, mesh8()) == [Collective(kind, size, ("head",))]


def test_asynchronous_permutation():
  found = audit_line(
    "%s = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) "
    "collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}\n"
    "  %d = f32[4,2]{1,0} collective-permute-done(%s)",
    mesh8(),
  )
  assert found == [Collective("collective-permute", 32, ("data",))]


def test_wrapped_asynchronous_collective_counts_where_it_stands():
  found = audit_line(
    f"%r = f32[2]{{0}} reduce-scatter(%a), {HEADS}to_apply=%add\n}}\n\n"
    "%main (p: f32[8]) -> f32[2] {\n"
    "  %s = ((f32[8]), f32[2], u32[]) async-start(%p), calls=%wrapped\n"
    "  %d = f32[2] async-done(%s)",
    mesh8(),
  )
  assert found == [Collective("reduce-scatter", 8, ("head",))]


@pytest.mark.parametrize(
  "shape, size",
  [
    ("pred[3]{0}", 3),
    ("s4[5]{0:E(4)}", 3),
    ("u2[8]", 2),
    ("f8e4m3fn[7]", 7),
    ("f8e4m3b11fnuz[7]", 7),
    ("f4e2m1fn[6]", 3),
    ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
    ("f16[]", 2),
    ("f64[2]", 16),
    ("c128[2]", 32),
    ("f32[0,4]", 0),
    ("f32[<=8]", 32),
    ("(f32[2]{0:T(256)}, /*index=1*/s64[3]{0})", 32),
  ],
)
def test_bytes_of_a_shape(shape, size):
  line = f"ROOT %r = {shape} all-to-all(%p), {HEADS}dimensions={{0}}"
  assert audit_line(line, mesh8()) == [
    Collective("all-to-all", size, ("head",))
  ]


@pytest.mark.parametrize("kind", ["ragged-all-to-all", "collective-broadcast"])
def test_kinds_that_the_cpu_does_not_compile(kind):
  line = f"cb.1 = bf16[6,2]{{1,0}} {kind}(a, b.2), channel_id=3, {HEADS}"
  assert audit_line(line, mesh8()) == [Collective(kind, 24, ("head",))]


def test_ragged_all_to_all_as_jax_lowers_it():
  def f(x):
    i = jnp.arange(4, dtype=jnp.int32)
    one = jnp.ones(4, jnp.int32)
    y = lax.ragged_all_to_all(
      x[0], jnp.zeros(16), i, one, i, one, axis_name="head"
    )
    return y[None]

  mesh = mesh8()
  with jax.set_mesh(mesh):
    x = sharding.place(jnp.ones((8, 16)), mesh, ALL)
    g = jax.shard_map(f, in_specs=ALL, out_specs=ALL, check_vma=False)
    text = jax.jit(g).lower(x).as_text("hlo")
  assert sharding.collectives(text, mesh) == [
    Collective("ragged-all-to-all", 64, ("head",))
  ]


@pytest.mark.parametrize(
  "line",
  [
    '%r = f32[8] add(%p, %q), metadata={op_name="f/ all-reduce(x)"}',
    "%all-reduce.1 = f32[8] get-tuple-element(%all-reduce), index=0",
    "%all-reduce-scatter (p: f32[8]) -> f32[2] {",
    "%d = f32[8]{0} all-reduce-done(%all-reduce-start)",
  ],
)
def test_what_only_looks_like_a_collective(line):
  assert audit_line(line, mesh8()) == []


@pytest.mark.parametrize(
  "line, message",
  [
    (SUM + "to_apply=%add", "replica_groups of all-reduce"),
    (SUM + "replica_groups=new[8]", "replica_groups of all-reduce"),
    (SUM + "replica_groups={{0,8}}", "mesh has 8 devices, the program has"),
    (SUM + "replica_groups={{0,1}}", "has all-reduce over 2; pass the mesh"),
    (
      "%r = f32[8] collective-permute(%p), source_target_pairs={{7,8}}",
      "mesh has 8 devices",
    ),
    ("%r = q7[8] all-gather(%p), " + HEADS, "dtype='q7'"),
  ],
)
def test_what_is_not_understood_is_never_passed_over(line, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    audit_line(line, mesh8())
