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


# Streamed batches


def stream(images, **kwargs):
  labels = np.arange(len(images)) % 5
  rows = np.arange(3, len(images))
  settings = {"seed": 5, "task": 1, "batch": 4, "epochs": 3}
  return pipeline.StreamedBatches(
    images, labels, rows, **{**settings, **kwargs}
  )


class Records:
  """A source as TFDS makes them, with a count of what was read."""

  def __init__(self, images, key="image"):
    self.images, self.key, self.reads = images, key, 0

  def __len__(self):
    return len(self.images)

  def __getitem__(self, row):
    self.reads += 1
    return {self.key: self.images[row], "label": row % 5}


class BatchedRecords(Records):
  def __getitem__(self, row):
    raise AssertionError("a batch must be read in one call")

  def __getitems__(self, rows):
    assert all(type(row) is int for row in rows)
    return [{self.key: self.images[row]} for row in rows]


@pytest.mark.parametrize("kind", ["array", "mapped", "records", "batched"])
def test_streamed_batches_equal_those_in_memory(kind, tmp_path):
  images = images_of(17)
  np.save(tmp_path / "images.npy", images)
  source = {
    "array": lambda: images,
    "mapped": lambda: np.load(tmp_path / "images.npy", mmap_mode="r"),
    "records": lambda: Records(images),
    "batched": lambda: BatchedRecords(images),
  }[kind]()
  labels = np.arange(17) % 5
  batches = list(stream(source).iterate())
  assert len(batches) == len(stream(source)) == 12
  held, held_labels = jnp.asarray(images), jnp.asarray(labels)
  for step, (pixels, target, index) in enumerate(batches):
    epoch, inner = divmod(step, 4)
    expected = order(np.arange(3, 17), seed=5, task=1, epoch=epoch)[inner]
    np.testing.assert_array_equal(index, expected)
    rows = jnp.asarray(index)
    np.testing.assert_array_equal(pixels, augment.take_rows(held, rows))
    np.testing.assert_array_equal(target, augment.take_rows(held_labels, rows))
    assert pixels.dtype == np.uint8 and target.dtype == np.int32
    assert type(pixels) is np.ndarray
  assert (batches[3][2] == -1).sum() == 2


@pytest.mark.parametrize("start", [0, 1, 4, 6, 11, 12])
def test_a_stream_resumes_at_any_step(start):
  whole = list(stream(images_of(17)).iterate())
  rest = list(stream(images_of(17)).iterate(start, threads=2, ahead=3))
  assert len(rest) == 12 - start
  for before, after in zip(whole[start:], rest):
    for left, right in zip(before, after):
      np.testing.assert_array_equal(left, right)


def test_a_batch_is_read_by_its_step_alone():
  batches = stream(images_of(17))
  later = batches[7]
  for left, right in zip(later, list(batches.iterate())[7]):
    np.testing.assert_array_equal(left, right)


def test_processes_read_their_columns():
  images = images_of(17)
  whole = stream(images)
  halves = [stream(images, columns=slice(i, i + 2)) for i in (0, 2)]
  for step in range(len(whole)):
    parts = zip(*(half[step] for half in halves))
    for expected, part in zip(whole[step], parts):
      np.testing.assert_array_equal(expected, np.concatenate(part))


def test_a_closed_stream_stops_reading_and_leaves_no_thread():
  before = set(threading.enumerate())
  source = Records(images_of(100))
  batches = stream(source, epochs=50).iterate(threads=2, ahead=2)
  next(batches)
  batches.close()
  left = [t for t in set(threading.enumerate()) - before if not t.daemon]
  for thread in left:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in left)
  # One batch used, two ahead, two in the threads' hands, and one to spare.
  assert source.reads <= 6 * 4


def test_a_fault_while_reading_reaches_the_loop():
  source = Records(images_of(17), key="picture")
  with pytest.raises(KeyError, match="image"):
    list(stream(source).iterate())
  assert len(list(stream(source, image_key="picture").iterate())) == 12


def test_faults_of_the_stream():
  images = images_of(17)
  with pytest.raises(ValueError, match="images has 17 rows, labels 16"):
    pipeline.StreamedBatches(
      images, np.arange(16), np.arange(3), seed=0, task=0, batch=2, epochs=1
    )
  with pytest.raises(ValueError, match="epochs=0 trains nothing"):
    stream(images, epochs=0)
  with pytest.raises(ValueError, match="start=13 is outside the task's 12"):
    stream(images).iterate(13)
  with pytest.raises(IndexError, match="step=12 is outside 0 to 11"):
    stream(images)[12]


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
    pixels = augment.take_rows(table, index)
    return augment.prepare(pixels, key, index, **settings)

  with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
    index = jax.reshard(jnp.arange(16), P("data"))
    specs = P(), P("data"), P()
    cut = jax.shard_map(step, in_specs=specs, out_specs=P("data"))
    got = jax.jit(cut if manual else step)(table, index, key)
    assert jax.typeof(got).sharding.spec[0] == "data"
  np.testing.assert_array_equal(got, prepare(images, key))


def test_a_padding_entry_reads_row_0():
  table = jnp.arange(5) + 10
  got = augment.take_rows(table, jnp.array([4, -1, 2]))
  assert got.tolist() == [14, 10, 12]


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
