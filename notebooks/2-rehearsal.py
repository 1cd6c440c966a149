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
# # 2. A buffer spread over the workers, drawn from as if it were one
#
# Bouvier, Nicolae, Chaugier, Costan, Foster, Antoniu, *Efficient Data-Parallel
# Continual Learning with Asynchronous Distributed Rehearsal Buffers*, CCGrid
# 2024, arXiv 2406.03285.
#
# $w$ data-parallel workers keep a part each of one buffer, organised by class.
# In every step a worker
#
# - trains on $b$ new samples and the $r$ rows that it was dealt a step ago;
# - stores of its $b$ samples: a class that is not full takes each, a full one
#   replaces a random row with probability $c / b$;
# - is dealt $r$ rows for the next step, from the rows of *all* workers.
#
# Neither the draw nor the store depends on a gradient, so both can run beside
# the step. A draw is fair if every one of the $M$ rows that are held is as
# likely to be in it as any other:
#
# $$P(\text{row } i \text{ is drawn}) = \frac{w r}{M} .$$
#
# **What is the paper's, and what is ours.** The above is the paper's, read from
# its released code. Ours: draws are exact, with different rows and the
# probability above at every fill; labels and counts are known to every worker,
# so that storing sends nothing and a draw is one all-to-all of rows; one model
# of many classes became one head a task. See `docs/methods/2-rehearsal.md`.

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
# ## Two workers, digits in five tasks
#
# The buffer holds 430 of 1,437 training samples over both workers, as stored.

# %%
import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np

import mhil

mhil.sharding.simulate(2)
devices = jax.devices() if jax.device_count() >= 2 else jax.devices("cpu")
mesh = mhil.sharding.make_mesh(data=2, devices=devices)
digits = mhil.data.load("digits")
stream = mhil.streams.class_incremental(digits.classes, increment=2)
branch = mhil.networks.mlp(8 * 8, stream.head_width + 1)
objective = mhil.objectives.end_to_end(branch)

WORKERS, SIZE, BATCH, DRAWS = 2, 430, 56, 14


def build(memory=True, again=False):
  recipe = mhil.recipe.Recipe(
    epochs=6, batch=BATCH, cumulative=again, from_scratch=again
  )
  transform = None
  if memory:
    transform = mhil.rehearsal.transform(
      mesh,
      digits,
      size=SIZE,
      batch=BATCH,
      draws=DRAWS,
      candidates=14,
      policy="per_class",
    )
  parts = mesh, stream, digits, objective, mhil.losses.dce()
  return mhil.prepare.build(*parts, recipe, seed=0, transform=transform)


runs = {
  "every sample again, from scratch": build(memory=False, again=True),
  "buffer of 30 %": build(),
  "no buffer": build(memory=False),
}
results = {name: mhil.trainer.fit(run) for name, run in runs.items()}
for name, result in results.items():
  held = result.metrics["memory"]
  accuracy = result.metrics["average_incremental_accuracy"]
  print(f"{name:33} {100 * accuracy:.1f} %, {held['held']} rows held")

# %% [markdown]
# What a step of the buffer's run sends, read from the compiled program: the
# gradients, and the rows drawn.

# %%
for found in results["buffer of 30 %"].metrics["collectives"]:
  print(found["kind"], found["bytes"], "bytes over", *found["axes"])

# %% [markdown]
# ## Is a draw fair?
#
# Half-way through a stream is where it is hard: here after three of five tasks,
# when four classes have not come yet. The run is stopped there, and 4,000 draws
# are made from the buffer that it left.

# %%
steps = results["buffer of 30 %"].metrics["steps_per_task"]
asked = itertools.count(1)
stopped = mhil.trainer.fit(
  runs["buffer of 30 %"], stop=lambda: next(asked) >= sum(steps[:3])
)
layout = mhil.buffer.layout("per_class", SIZE, digits.classes, WORKERS)
buffer = stopped.state.memory.buffer
held = mhil.rehearsal.held(layout, buffer)
print(len(held), "rows of", len(np.unique(held)), "samples")


def draw_often(buffer, keys):
  def numbers(key):
    each = DRAWS // WORKERS
    return mhil.drawing.draw(layout, buffer, key, count=each).number

  return jax.lax.map(numbers, keys)


TIMES = 4000
spread = jax.shard_map(
  draw_often,
  mesh=mesh,
  in_specs=(mhil.buffer.SPEC, jax.P()),
  out_specs=jax.P(None, "data"),
)
keys = jax.random.split(jax.random.key(0), TIMES)
keys = mhil.sharding.replicated(keys, mesh)
drawn = np.asarray(jax.jit(spread)(buffer, keys))
print("rows of one draw:", len(np.unique(drawn[0])), "different ones")

# %% [markdown]
# As a control, draws of another rule, which is how we read the released code: a
# class by a random number below ten, modulo the six classes that have come, and
# then a row of it. Four classes so have two numbers each, and two have one.

# %%
labels = digits.train_labels[held]
arrived = np.array(stream.seen(2))
rng = np.random.default_rng(0)
classes = rng.integers(0, 10, TIMES * DRAWS) % len(arrived)
control = np.zeros(len(held))
for rank, times in enumerate(np.bincount(classes)):
  rows = np.flatnonzero(labels == arrived[rank])
  np.add.at(control, rng.choice(rows, times), 1)


def over_expected(times):
  """How often each row was drawn, over how often it should have been."""
  return times / (TIMES * DRAWS / len(held))


# A sample that is held twice is drawn twice as often; its rows share that.
copies = np.bincount(held)
exact = np.bincount(drawn.ravel(), minlength=copies.size)[held] / copies[held]
share = DRAWS / len(held)
noise = np.sqrt((1 - share) / (TIMES * share))
order = np.argsort([list(arrived).index(c) for c in labels], kind="stable")

# %% [markdown]
# ## The picture

# %%
blue, orange, green, *_ = mhil.plots.OKABE_ITO
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for (name, result), color in zip(results.items(), (green, blue, orange)):
  accuracy = np.array(result.metrics["accuracy_after_task"])
  left.plot(100 * accuracy, marker="o", color=color, label=name)
left.set(xlabel="after task", ylabel="test accuracy on all classes seen, %")
left.set(xticks=range(5), ylim=(0, 102))
left.legend(frameon=False)
for times, name, color in (
  (control, "released rule, as we read it", orange),
  (exact, "exact draws", blue),
):
  points = over_expected(times)[order]
  right.plot(points, ".", color=color, ms=4, label=name)
right.axhspan(1 - 3 * noise, 1 + 3 * noise, color="0.85", zorder=0)
right.set(xlabel="row held, class by class", ylim=(0, None))
right.set(ylabel="times drawn, over expected")
right.legend(frameon=False, loc="lower left")
for axes in left, right:
  axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Grey: three standard deviations of a fair draw. The control only shows what
# unfair looks like here: that exact draws are worth accuracy is not shown, and
# by the end of a stream the two rules agree.
#
# What this notebook claims, checked:

# %%
average = {
  name: result.metrics["average_incremental_accuracy"]
  for name, result in results.items()
}
assert average["buffer of 30 %"] > average["no buffer"] + 0.2
kinds = [c["kind"] for c in results["buffer of 30 %"].metrics["collectives"]]
assert kinds.count("all-to-all") == 1
# Of some 258 rows none is five deviations off; of the control's, many.
assert np.abs(over_expected(exact) - 1).max() < 5 * noise
assert np.abs(over_expected(control) - 1).max() > 5 * noise

# %% [markdown]
# ## Try
#
# - `SIZE = 100`, or `DRAWS = 56`: as many old rows as new samples.
# - `policy="balanced"` or `"reservoir"` (in `layout` too).
# - `scope="local"` in `rehearsal.transform`: a worker draws from its own rows,
#   and the all-to-all is gone.
