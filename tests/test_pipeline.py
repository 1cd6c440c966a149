"""Order, streamed batches and augmentation against plain numpy models."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import augment, pipeline

P = jax.P
NORM = {"scale": 255.0, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def images_of(n, height=8, width=6, channels=3):
  shape = n, height, width, channels
  return np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)


def order(rows, **kwargs):
  settings = {"seed": 0, "task": 0, "epoch": 0, "batch": 4}
  return pipeline.epoch_order(rows, **{**settings, **kwargs})


# Order


def test_an_epoch_holds_every_row_once_and_pads_the_last_batch():
  rows = np.arange(100, 110)
  batches = order(rows)
  assert batches.shape == (3, 4) and batches.dtype == np.int32
  assert (batches.ravel()[10:] == -1).all()
  np.testing.assert_array_equal(np.sort(batches.ravel()[:10]), rows)


def test_the_order_is_fixed_for_ever():
  # Typed in: an order that changes between releases breaks every resume.
  expected = [[0, 1, 6, 2], [3, 4, 8, 5], [9, 7, -1, -1]]
  assert order(np.arange(10), seed=3, task=2, epoch=1).tolist() == expected


@pytest.mark.parametrize("name", ["seed", "task", "epoch"])
def test_the_order_depends_on_seed_task_and_epoch(name):
  rows = np.arange(50)
  other = order(rows, **{name: 1})
  assert (order(rows) == order(rows)).all()
  assert (order(rows) != other).any()
  # Task 1 epoch 0 must not be task 0 epoch 1, and so on.
  for again in {"seed", "task", "epoch"} - {name}:
    assert (order(rows, **{again: 1}) != other).any()


def test_the_largest_seed_is_accepted():
  assert order(np.arange(3), seed=2**64 - 1).shape == (1, 4)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"seed": -1}, r"seed=-1 is outside 0 to 2\^64 - 1"),
    ({"task": 2**32}, r"task=4294967296 is outside 0 to 2\^32 - 1"),
    ({"batch": 0}, "batch=0 holds no image; use 1 or more"),
  ],
)
def test_faults_of_the_order(kwargs, message):
  with pytest.raises(ValueError, match=message):
    order(np.arange(3), **kwargs)


def test_an_empty_task_is_a_fault():
  with pytest.raises(ValueError, match="rows is empty"):
    order(np.arange(0))


# Reading ahead


class Source:
  """Images that know which rows were read, and that a fault can hide in."""

  def __init__(self, images, broken=-1):
    self.images, self.broken, self.reads = images, broken, []

  def __call__(self, step):
    self.reads.append(step)
    if step == self.broken:
      raise OSError(f"record {step} is damaged")
    return self.images[step : step + 2]


def test_results_come_in_order_whatever_the_threads():
  images = images_of(50)
  read = list(pipeline.ahead(Source(images), range(48), threads=7, ready=3))
  assert len(read) == 48
  for step, part in enumerate(read):
    np.testing.assert_array_equal(part, images[step : step + 2])


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_a_stream_resumes_at_any_step(start):
  source = Source(images_of(17))
  rest = list(pipeline.ahead(source, range(start, 12), threads=2, ready=3))
  assert len(rest) == 12 - start
  assert sorted(source.reads) == list(range(start, 12))
  for step, part in zip(range(start, 12), rest):
    np.testing.assert_array_equal(part, source.images[step : step + 2])


def test_a_closed_stream_stops_reading_and_leaves_no_thread():
  before = set(threading.enumerate())
  source = Source(images_of(100))
  batches = pipeline.ahead(source, range(5000), threads=2, ready=2)
  next(batches)
  batches.close()
  left = [t for t in set(threading.enumerate()) - before if not t.daemon]
  for thread in left:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in left)
  # One batch used, two ready, two in the threads' hands, and one to spare.
  assert len(source.reads) <= 6


def test_a_fault_while_reading_reaches_the_loop():
  batches = pipeline.ahead(Source(images_of(17), broken=3), range(9))
  assert [len(next(batches)) for _ in range(3)] == [2, 2, 2]
  with pytest.raises(OSError, match="record 3 is damaged"):
    next(batches)


# Augmentation


def prepare(images, key, positions=None, **kwargs):
  positions = jnp.arange(len(images)) if positions is None else positions
  settings = {"pad": 2, "flip": True, "train": True, **NORM, **kwargs}
  run = jax.jit(functools.partial(augment.prepare, **settings))
  return run(jnp.asarray(images), key, positions)


def numpy_norm(images, mean=NORM["mean"], std=NORM["std"]):
  scaled = images.astype(np.float32) / np.float32(255)
  return (scaled - np.float32(mean)) / np.float32(std)


def test_normalisation_is_exact_for_uint8():
  images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  out = augment.prepare(
    jnp.asarray(images),
    scale=255.0,
    mean=(0.1307,),
    std=(0.3081,),
    train=False,
  )
  assert out.dtype == jnp.float32
  expected = numpy_norm(images, (0.1307,), (0.3081,))
  np.testing.assert_array_equal(out, expected)
  # By hand: (255/255 - 0.1307) / 0.3081, to float32's seven digits.
  assert float(out[0, -1, -1, 0]) == pytest.approx(2.8215, abs=1e-4)


def test_float_images_are_only_scaled_and_shifted():
  images = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
  out = augment.normalise(
    jnp.asarray(images, jnp.float32), scale=1.0, mean=(1.0,), std=(2.0,)
  )
  # Powers of two: their reciprocals are exact.
  np.testing.assert_array_equal(out, (np.float32(images) - 1) / 2)


def candidates(image, pad, flip):
  """Yields every crop and mirror image that augmentation may give."""
  height, width, _ = image.shape
  border = ((pad, pad), (pad, pad), (0, 0))
  padded = np.pad(image, border, mode="reflect")
  for y in range(2 * pad + 1):
    for x in range(2 * pad + 1):
      crop = padded[y : y + height, x : x + width]
      for mirrored in (0, 1) if flip else (0,):
        yield (y, x, mirrored), crop[:, ::-1] if mirrored else crop


@pytest.mark.parametrize("pad", [0, 1, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_against_numpy(pad, flip):
  images = images_of(40)
  out = np.asarray(prepare(images, jax.random.key(1), pad=pad, flip=flip))
  for image, got in zip(images, out):
    crops = [c for _, c in candidates(image, pad, flip)]
    hits = [np.array_equal(numpy_norm(crop), got) for crop in crops]
    assert any(hits)


def test_every_crop_and_mirror_image_is_as_likely():
  image = images_of(1)
  images = np.repeat(image, 4000, 0)
  out = np.asarray(prepare(images, jax.random.key(2), pad=1))
  counts = [
    (out == numpy_norm(crop)).all((1, 2, 3)).sum()
    for _, crop in candidates(image[0], 1, True)
  ]
  assert sum(counts) == 4000 and len(counts) == 18
  # Binomial: 222 +- 14.5; five deviations, and the key is fixed.
  assert max(abs(np.array(counts) - 4000 / 18)) < 5 * 14.5


def test_augmentation_depends_on_the_key_and_on_nothing_else():
  images = images_of(32)
  first, again, other = (prepare(images, jax.random.key(k)) for k in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first) != np.asarray(other)).any()


def test_the_draw_belongs_to_the_position():
  images, key = images_of(12), jax.random.key(5)
  whole = prepare(images, key)
  rows = np.array([7, 2, 11])
  part = prepare(images[rows], key, jnp.asarray(rows))
  np.testing.assert_array_equal(part, np.asarray(whole)[rows])


def test_no_augmentation_without_train():
  images = images_of(6)
  plain = prepare(images, jax.random.key(0), train=False)
  np.testing.assert_array_equal(plain, numpy_norm(images))


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_batch_cut_over_devices_is_augmented_alike(devices, manual):
  images, key = images_of(16), jax.random.key(6)
  table = jnp.asarray(np.concatenate([images, images_of(3)]))
  settings = {"pad": 2, "flip": True, "train": True, **NORM}

  def step(table, index, key):
    where = jax.typeof(index).sharding
    pixels = table.at[index].get(out_sharding=where)
    return augment.prepare(pixels, key, index, **settings)

  with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
    index = jax.reshard(jnp.arange(16), P("data"))
    specs = P(), P("data"), P()
    cut = jax.shard_map(step, in_specs=specs, out_specs=P("data"))
    got = jax.jit(cut if manual else step)(table, index, key)
    assert jax.typeof(got).sharding.spec[0] == "data"
  np.testing.assert_array_equal(got, prepare(images, key))


def test_runs_where_rank_promotion_is_an_error():
  with jax.numpy_rank_promotion("raise"):
    prepare(images_of(2), jax.random.key(0))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"pad": 6}, "pad=6 does not fit images of 8x6; use 0 to 5"),
    ({"pad": -1}, "pad=-1 does not fit"),
    ({"mean": (0.5,)}, "mean and std have 1 and 3 entries, the images 3"),
  ],
)
def test_faults_of_augmentation(kwargs, message):
  with pytest.raises(ValueError, match=message):
    prepare(images_of(2), jax.random.key(0), **kwargs)


def test_augmentation_without_positions_is_a_fault():
  # With local positions by default each device would draw alike.
  with pytest.raises(ValueError, match="key and positions are needed"):
    augment.prepare(
      jnp.asarray(images_of(2)), jax.random.key(0), pad=1, train=True, **NORM
    )
