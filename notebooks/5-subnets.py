# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. A network in parts that train without each other
#
# Yuan, Wolfe, Dun, Tang, Kyrillidis, Jermaine, *Distributed Learning of Deep
# Neural Networks using Independent Subnet Training*, PVLDB 15(8), 2022, arXiv
# 1910.02120.
#
# The neurons of every hidden layer are permuted and cut into $n$ groups. Worker
# $i$ gets group $g_i$ of every layer, with all inputs and all outputs:
#
# $$W_1[:, g_i^1], \qquad W_2[g_i^1, g_i^2], \qquad W_3[g_i^2, :] .$$
#
# It takes $J$ steps on samples of its own, with no word to the others; then all
# subnets are copied back and the neurons are dealt anew. A worker holds an
# $n$-th of the first and last layer and an $n^2$-th of a hidden one, computes
# as much less, and sends once in $J$ steps what data parallelism sends, and
# more, in each.
#
# **What is the paper's, and what is ours.** The above is the paper's, with
# plain SGD and batch norm on every layer, and agrees with its released
# functions. Ours is that there is no server: neurons go from their device to
# their next one, in an all-to-all. See `docs/methods/5-subnets.md`, also for
# the residual form.

# %%
# Where mhil is not installed, this installs it: from a checkout around it, or,
# as on Colab, from the repository, whose address has to be filled in here.
REPOSITORY = ""  # "git+https://HOST/OWNER/NAME"

import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("mhil") is None:
  checkout = pathlib.Path.cwd().parent
  if not REPOSITORY and not (checkout / "mhil" / "__init__.py").is_file():
    raise RuntimeError("mhil is not installed; fill in REPOSITORY in this cell")
  extra = "[cuda12]" if shutil.which("nvidia-smi") else ""
  extra = "[tpu]" if pathlib.Path("/dev/accel0").exists() else extra
  package = f"mhil{extra} @ {REPOSITORY or checkout.as_uri()}"
  pip = [sys.executable, "-m", "pip", "install", "--quiet", package]
  subprocess.run(pip, check=True)

# %% [markdown]
# ## Four workers, and two ways that everyone knows
#
# *Local SGD*: every worker trains a copy of the whole network, and copies are
# averaged every $J$ steps. *Data parallel*: gradients are averaged in each
# step. All see as many samples. *Fixed subnets* are dealt once and never again.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import mhil

N, J, EPOCHS, WIDTHS = 4, 20, 40, (128, 128)
mhil.sharding.simulate(N)
devices = jax.devices() if jax.device_count() >= N else jax.devices("cpu")
mesh = mhil.sharding.make_mesh(subnet=N, devices=devices)
digits = mhil.data.load("digits")
stream = mhil.streams.class_incremental(digits.classes, increment=10)
recipe = mhil.recipe.Recipe(
  optimizer=mhil.optimizers.sgd(momentum=0.0),
  rate=mhil.optimizers.constant(0.1),
  epochs=EPOCHS,
  batch=32 * N,
  correction=False,
)


def network(widths):
  how = {"norm": "batch", "output_norm": True, "axis": "data"}
  return mhil.networks.mlp(8 * 8, digits.classes + 1, widths, **how)


params, _ = network(WIDTHS).init(jax.random.key(0))
WEIGHTS = mhil.networks.count_parameters(params)


def built(method="ist", renew=True):
  """A run, compiled."""
  whole = network(WIDTHS)
  part, cut = whole, mhil.cutting.copies(N)
  if method == "ist":
    part = network([width // N for width in WIDTHS])
    cut = mhil.subnets.neurons(WIDTHS, N)
  partition = mhil.subnets.partition(
    cut,
    mhil.objectives.end_to_end(part),
    every=J,
    method=method,
    renew=renew,
  )
  objective = mhil.subnets.tested(
    mhil.objectives.end_to_end(whole), whole, "collected"
  )
  loss = mhil.losses.dce("none")  # of a single head, plain cross-entropy
  parts = mesh, stream, digits, objective, loss, recipe
  return mhil.prepare.build(*parts, seed=0, partition=partition)


# %% [markdown]
# ## Steps and exchanges
#
# `mhil.trainer.train` would do; the loop is written out here to test on the way
# and to see its two halves, a step and an exchange.


# %%
def sent(found):
  return mhil.sharding.bytes_over(found, "subnet")


def trained(run, tests=8):
  """Bytes that a device has got, accuracy and coverage, along the run."""
  state = mhil.run.start(run)
  feed = mhil.phases.open_phase(run, run.phases[0])
  steps, partition = run.phases[0].steps, run.partition
  marks = {round((i + 1) * len(steps) / tests) for i in range(tests)}
  indices, received, points = [], sent(run.dealt), []
  for step, given in zip(steps, mhil.inputs.steps(run, feed, 0)):
    if step % max(partition.every, 1) == 0:
      indices.append(jax.tree.map(np.array, state.bank.apart.index))
    batches, samples = given
    state = run.step(state, batches, feed.task, samples)
    if run.one_at_a_time:
      jax.block_until_ready(state)
    received += sent(run.traffic)
    before, state = state, run.exchange(state, step + 1)
    received += sent(run.exchanged) * (state is not before)
    if step + 1 in marks:
      tally = mhil.phases.evaluate(run, state, feed)
      covered = mhil.partitions.coverage(partition, indices, WEIGHTS)
      points.append((step + 1, received, mhil.metrics.accuracy(tally), covered))
  return np.array(points).T


runs = {
  "subnets (IST)": built(),
  "fixed subnets": built(renew=False),
  "local SGD": built("local_sgd"),
  "data parallel": built("data_parallel"),
}
curves = {name: trained(run) for name, run in runs.items()}
print(f"{'':14}    bytes a step   an exchange   operations a step")
for name, run in runs.items():
  work = run.step.cost_analysis()["flops"]
  print(
    f"{name:14} {sent(run.traffic):15,} {sent(run.exchanged):13,}"
    f" {work / 1e6:15.1f} M   {100 * curves[name][2, -1]:.1f} %"
  )

# %% [markdown]
# ## The picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for (name, curve), color in zip(curves.items(), mhil.plots.OKABE_ITO):
  step, received, accuracy, covered = curve
  style = {"color": color, "marker": "o", "ms": 4, "label": name}
  left.plot(received / 1e6, 100 * accuracy, **style)
  if "subnets" in name:
    right.plot(step, 100 * covered, **style)
left.set_xscale("log")
left.set(xlabel="MB over the subnet axis, a device", ylabel="test accuracy, %")
left.legend(frameon=False)
right.set(xlabel="steps", ylim=(0, 102))
right.set(ylabel="weights that were ever trained, %")
right.legend(frameon=False, loc="lower right")
for axes in left, right:
  axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Subnets move least of those that come to train the whole network, and every
# device computes and holds a part of it only. They are behind in accuracy: when
# it has moved as many bytes local SGD is ahead here, with a whole copy on each
# device, and fixed subnets get far for next to nothing; that they are an
# ensemble of small networks is a guess at why. One seed of a network that needs
# no distribution; three seeds, n = 2 and 8 and the same without batch norm are
# in `docs/results/subnets_digits.md`.
#
# What this notebook claims, checked:

# %%
ist, average = runs["subnets (IST)"], runs["local SGD"]
assert sent(ist.traffic) == sent(average.traffic) == 0
assert sent(ist.exchanged) < sent(average.exchanged) / 2
assert curves["data parallel"][1, -1] > 10 * curves["local SGD"][1, -1]
final = {name: curve[2, -1] for name, curve in curves.items()}
assert final["subnets (IST)"] > 0.9
at = curves["subnets (IST)"][1, -1]
assert at < curves["local SGD"][1, -1]
same_bytes = np.interp(at, *curves["local SGD"][1:3])
assert same_bytes > final["subnets (IST)"]
assert curves["subnets (IST)"][3, -1] > 0.95
# Fixed subnets leave all but an N-th of the weights between hidden layers.
left_out = (1 - 1 / N) * WIDTHS[0] * WIDTHS[1] / WEIGHTS
assert np.isclose(curves["fixed subnets"][3, -1], 1 - left_out)

# %% [markdown]
# ## Try
#
# - `N = 2` and `N = 8` (restart the kernel first: devices are simulated once).
# - `"batch"` in place of `"collected"`: tests normalise by their own batch, as
#   in the paper.
# - `python -m experiments.curves --suite=subnets_digits --seeds=3`: the whole
#   table.
