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
# # 1. Heads that learn without talking
#
# Dai, Kong, Zhong, Zhang, Wang, *A Fully Distributed Training for Class
# Incremental Learning in Multihead Networks*, INFOCOM Workshops 2023.
#
# Classes arrive task after task. Each task opens a *head*, a branch with
# features and outputs of its own, and each head lies on a device of its own.
# Cross-entropy ties the heads together, for its normaliser runs over the
# classes of all of them:
#
# $$\mathrm{CE}(x, y) = \log \sum_k e^{z_k} - z_y .$$
#
# A loss that needs no exchange has to fall apart into terms of one head each:
#
# $$L(x, y) = \sum_m \ell_m(f_m(x), y), \qquad
# \frac{\partial \ell_m}{\partial \theta_j} = 0 \ \text{ for } j \neq m .$$
#
# In `mhil` head $m$ solves a softmax over its own classes $C_m$ and one output
# more, the reference $r_m$, "none of mine":
#
# $$\ell_m = \log\Big(e^{r_m} + \sum_{k \in C_m} e^{z_k}\Big) - t_m, \qquad
# t_m = z_y \text{ if } y \in C_m, \text{ else } r_m .$$
#
# **What is the paper's, and what is ours.** Of the paper only the abstract is
# public: it asks for a fully distributed cross-entropy without exchange between
# nodes. The formula with a reference is our reconstruction of it, and nothing
# here shows that it is the authors'. See `docs/methods/1-dce.md`.

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
# ## Five heads on five devices
#
# scikit-learn's digits in five tasks of two classes. Devices that are not there
# are simulated on the CPU: what their programs send is what real ones would
# send, only times mean nothing.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import mhil

mhil.sharding.simulate(5)
devices = jax.devices() if jax.device_count() >= 5 else jax.devices("cpu")
mesh = mhil.sharding.make_mesh(head=5, devices=devices)
digits = mhil.data.load("digits")
stream = mhil.streams.class_incremental(digits.classes, increment=2)
branch = mhil.networks.mlp(8 * 8, stream.head_width + 1)
objective = mhil.objectives.end_to_end(branch)
print("classes of each task:", *stream.tasks)

# %% [markdown]
# ## Four ways to train them
#
# Only the loss differs, except for fine-tuning, which also remembers nothing.
# The others keep 100 samples in all and correct for the fact that new classes
# have many samples in a batch and old ones the few that were drawn again.


# %%
def train(loss, memory=100, correction=True):
  recipe = mhil.recipe.Recipe(epochs=10, correction=correction)
  transform = None
  if memory:
    transform = mhil.rehearsal.transform(mesh, digits, size=memory)
  parts = mesh, stream, digits, objective, loss
  return mhil.trainer.train(*parts, recipe, transform)


results = {
  "D-CE": train(mhil.losses.dce()),
  "distributed CE": train(mhil.losses.distributed_ce()),
  "CE": train(mhil.losses.ce()),
  "fine-tuning": train(mhil.losses.ce(), memory=0, correction=False),
}

# %% [markdown]
# ## What was sent between heads
#
# This is read from the program that XLA compiled, not from a promise: every
# collective, its size, and the mesh axes along which devices exchange
# something.


# %%
def between_heads(result):
  found = [
    mhil.sharding.Collective(**found) for found in result.metrics["collectives"]
  ]
  return [c for c in found if "head" in c.axes]


for name, result in results.items():
  print(f"{name}:")
  for collective in between_heads(result):
    print("  ", collective.kind, collective.bytes, "bytes")

# %% [markdown]
# ## The picture

# %%
sent = {
  name: mhil.sharding.bytes_over(between_heads(result), "head")
  for name, result in results.items()
}
colors = dict(zip(results, mhil.plots.OKABE_ITO))
widths = 1.5, 3.5, 6, 2  # the first three lie upon each other
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for (name, result), width in zip(results.items(), widths):
  accuracy = np.array(result.metrics["accuracy_after_task"])
  style = {"color": colors[name], "lw": width, "zorder": 9 - width}
  left.plot(100 * accuracy, label=name, **style)
left.set(xlabel="after task", ylabel="test accuracy on all classes seen, %")
left.set(xticks=range(5), ylim=(0, 102))
left.legend(frameon=False)
bars = right.barh(list(sent), list(sent.values()), color=colors.values())
right.bar_label(bars, [f"{size:,}" for size in sent.values()], padding=4)
right.set(xlabel="bytes over the head axis, a step and device")
right.margins(x=0.15)
right.invert_yaxis()
for axes in left, right:
  axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# D-CE sends nothing between heads and is as accurate as cross-entropy, which
# sends every logit, and as distributed cross-entropy, which has the same value
# and gradient as cross-entropy and sends a max and a sum for each sample. One
# seed and a small problem: the table of five seeds is `docs/results/digits.md`.
#
# What this notebook claims, checked:

# %%
average = {
  name: result.metrics["average_incremental_accuracy"]
  for name, result in results.items()
}
for name, value in average.items():
  print(f"{name:15} {100 * value:.1f} %")
assert sent["D-CE"] == 0 < sent["distributed CE"] < sent["CE"]
assert average["D-CE"] > average["CE"] - 0.03
assert average["D-CE"] > average["fine-tuning"] + 0.3

# %% [markdown]
# ## Try
#
# - `mhil.losses.dce("zero")`, `"per_class"`, and `"none"`, whose heads see
#   their own samples only and so know nothing of each other.
# - `correction=False` for D-CE and for CE.
# - A mesh of `head=2`: heads are dealt in turn, and a device visits those that
#   it holds one after the other.
