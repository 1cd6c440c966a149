"""Image sets: what is read, what is known of it, and every refusal."""

import json
import pathlib
import shutil
import sys
import tracemalloc

import numpy as np
import pytest

from mhil import data, pipeline, sources

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


# Digits


def test_digits():
  digits = data.load("digits")
  assert digits.train_images.shape == (1437, 8, 8, 1)
  assert digits.test_images.shape == (360, 8, 8, 1)
  assert digits.train_images.dtype == np.uint8
  assert digits.train_labels.dtype == np.int32
  assert digits.train_images.max() == 16 and digits.scale == 16
  assert (digits.classes, digits.pad, digits.flip) == (10, 0, False)
  # A fifth of each class, to the nearest images.
  for label in range(10):
    test = (digits.test_labels == label).sum()
    total = test + (digits.train_labels == label).sum()
    assert abs(test - total / 5) <= 1
  scaled = digits.train_images / 16
  np.testing.assert_allclose(digits.mean, [scaled.mean()], rtol=1e-12)
  # The deviation comes from a difference of moments: half the digits.
  np.testing.assert_allclose(digits.std, [scaled.std()], rtol=1e-8)


def test_digits_are_split_into_different_images_for_ever():
  from sklearn import datasets

  digits = data.load("digits")
  joined = np.concatenate([digits.train_images, digits.test_images])
  stored = datasets.load_digits().images.reshape(1797, -1).astype(np.uint8)
  order = [np.lexsort(a.reshape(1797, -1).T) for a in (joined, stored)]
  np.testing.assert_array_equal(
    joined.reshape(1797, -1)[order[0]], stored[order[1]]
  )
  # Typed in: a split that changes makes results of releases incomparable.
  assert data.fingerprint(digits).startswith("02ac9368bca97ab1")


# Arrays


def small(n_train=12, n_test=6, shape=(5, 4, 3), classes=3):
  draw = np.random.default_rng(7)
  arrays = {}
  for split, n in (("train", n_train), ("test", n_test)):
    images = draw.integers(0, 256, (n, *shape), dtype=np.uint8)
    arrays[f"{split}_images"] = images
    arrays[f"{split}_labels"] = np.arange(n) % classes
  return arrays


def save(folder, arrays, **meta):
  for name, array in arrays.items():
    np.save(folder / f"{name}.npy", array, allow_pickle=True)
  if meta:
    (folder / "meta.json").write_text(json.dumps(meta))
  return f"arrays:{folder}"


def test_arrays(tmp_path):
  arrays = small()
  got = data.load(save(tmp_path, arrays))
  for name, array in arrays.items():
    np.testing.assert_array_equal(getattr(got, name), array)
  assert got.train_labels.dtype == got.test_labels.dtype == np.int32
  assert (got.classes, got.scale, got.pad, got.flip) == (3, 255, 0, False)
  scaled = arrays["train_images"] / 255
  np.testing.assert_allclose(got.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
  # The deviation comes from a difference of moments: half the digits.
  np.testing.assert_allclose(got.std, scaled.std((0, 1, 2)), rtol=1e-8)


@pytest.mark.parametrize(
  ("shape", "expected"), [((5, 4), (5, 4, 1)), ((7,), (1, 1, 7))]
)
def test_arrays_of_lower_rank(tmp_path, shape, expected):
  arrays = small(shape=shape)
  got = data.load(save(tmp_path, arrays))
  assert got.train_images.shape == (12, *expected)
  assert got.test_images.shape == (6, *expected)
  np.testing.assert_array_equal(
    got.train_images.ravel(), arrays["train_images"].ravel()
  )
  assert len(got.mean) == expected[-1]


def test_arrays_of_floats(tmp_path):
  arrays = small()
  for split in ("train", "test"):
    images = arrays[f"{split}_images"].astype(np.float32) - 100
    arrays[f"{split}_images"] = images
  got = data.load(save(tmp_path, arrays))
  assert got.train_images.dtype == np.float32 and got.scale == 1
  np.testing.assert_allclose(
    got.mean, arrays["train_images"].mean((0, 1, 2), np.float64), rtol=1e-12
  )


def test_arrays_are_mapped_and_not_read(tmp_path):
  got = data.load(save(tmp_path, small()))
  assert isinstance(got.train_images, np.memmap)
  assert not got.train_images.flags.writeable


def test_arrays_with_meta(tmp_path):
  meta = {"scale": 128, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
  got = data.load(save(tmp_path, small(), **meta, pad=2, flip=True))
  assert (got.scale, got.pad, got.flip) == (128.0, 2, True)
  assert got.mean == (0.1, 0.2, 0.3) and got.std == (1.0, 2.0, 3.0)


def test_without_augmentation_the_rest_of_the_settings_stays(tmp_path):
  place = save(tmp_path, small(), scale=128.0, pad=2, flip=True)
  plain, usual = data.load(place, augment=False), data.load(place)
  assert (plain.pad, plain.flip) == (0, False)
  assert (usual.pad, usual.flip) == (2, True)
  assert plain.scale == 128.0 and plain.mean == usual.mean


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
  arrays = small()
  arrays["train_images"][..., 1] = 9
  assert data.load(save(tmp_path, arrays)).std[1] == 1.0


def test_limit_keeps_the_first_of_each_class(tmp_path):
  arrays = small(n_train=14, classes=4)
  got = data.load(save(tmp_path, arrays), limit=2)
  np.testing.assert_array_equal(got.train_labels, [0, 1, 2, 3] * 2)
  np.testing.assert_array_equal(got.train_images, arrays["train_images"][:8])
  assert len(got.test_labels) == 6


def test_a_limit_may_leave_the_test_split_whole(tmp_path):
  folder = save(tmp_path, small(n_train=14, classes=4))
  cut, whole = (data.load(folder, limit=1, whole_test=w) for w in (False, True))
  assert len(cut.train_labels) == len(whole.train_labels) == 4
  assert len(cut.test_labels) == 4
  np.testing.assert_array_equal(
    whole.test_images, data.load(folder).test_images
  )


def edit(name, change):
  """Returns small() with one array changed."""
  arrays = small()
  arrays[name] = change(arrays[name])
  return arrays


def holed(images):
  images = images.astype(np.float32)
  images[7, 1, 1, 1] = np.nan
  return images


FAULTS = {
  "unequal": (
    edit("train_labels", lambda y: y[:-1]),
    "train_images has 12 rows, train_labels 11; save one label an image",
  ),
  "negative": (
    edit("test_labels", lambda y: y - 1),
    "test_labels holds -1 to 1, the first that is no class in row 0; number",
  ),
  "a huge label": (
    edit("train_labels", lambda y: y + (np.arange(12) == 4) * 2**40),
    "train_labels holds 0 to 1099511627777, the first .* in row 4; number",
  ),
  "holes": (
    edit("train_labels", lambda y: y * 2),
    "train_labels lack 1, 3 of the ids 0 to 4; renumber",
  ),
  "many holes": (
    edit("train_labels", lambda y: y * 50),
    "lack 1, 2, 3, 4, 5, 6, 7, 8 and 90 more of the ids 0 to 100",
  ),
  "float labels": (
    edit("train_labels", lambda y: y / 2),
    r"train_labels is float64\[12\]; save one integer an image",
  ),
  "one-hot labels": (
    edit("train_labels", lambda y: np.eye(3, dtype=int)[y]),
    r"train_labels is int64\[12, 3\]; save one integer an image",
  ),
  "no images": (
    {name: array[:0] for name, array in small().items()},
    "train_labels is empty",
  ),
  "strange to training": (
    edit("test_labels", lambda y: y + 2),
    "test_labels hold 3, 4, which train_labels lack",
  ),
  "not a number": (
    edit("train_images", holed),
    "train_images holds NaN or infinity, first in image 7; repair or drop",
  ),
  "objects": (
    edit("train_images", lambda x: x.astype(object)),
    "train_images.npy is no plain array .*objects are refused",
  ),
  "doubles": (
    edit("train_images", lambda x: x / 255),
    "train_images is float64; save uint8 or float32",
  ),
  "shapes": (
    edit("test_images", lambda x: x[:, 1:]),
    r"train_images are uint8\[5, 4, 3\], test_images uint8\[4, 4, 3\]; save",
  ),
  "dtypes": (
    edit("test_images", lambda x: x.astype(np.float32)),
    r"test_images float32\[5, 4, 3\]; save both alike",
  ),
  "rank": (
    edit("train_images", lambda x: x[..., None]),
    r"train_images has shape \[12, 5, 4, 3, 1\]; save \[n, height",
  ),
  "a number": (
    edit("train_images", lambda x: np.uint8(3)),
    r"train_images has shape \[\]",
  ),
  "no height": (
    edit("train_images", lambda x: x[:, :0]),
    r"train_images has shape \[12, 0, 4, 3\]; save .*none of them 0",
  ),
  "no channels": (
    edit("test_images", lambda x: x[..., :0]),
    r"test_images has shape \[6, 5, 4, 0\]; save",
  ),
  "no pixels": (
    edit("train_images", lambda x: x[:, 0, 0, :0]),
    r"train_images has shape \[12, 0\]; save",
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_arrays(tmp_path, fault):
  arrays, message = FAULTS[fault]
  one_line(message, save(tmp_path, arrays))


def one_line(message, name, **kwargs):
  with pytest.raises(ValueError, match=message) as caught:
    data.load(name, **kwargs)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("meta", "message"),
  [
    ({"means": [0]}, "meta.json holds 'means'; it may hold scale, mean, std"),
    ({"mean": 0.5, "std": 1}, "meta.json: mean=0.5 is not a list of numbers"),
    ({"mean": [0.5] * 3}, "meta.json has one of mean and std, which go togeth"),
    ({"mean": [0.5], "std": [1]}, "need one entry for each of the 3 channels"),
    ({"pad": 4}, "pad=4 does not fit images of 4 pixels; use 0 to 3"),
    *(
      ({"std": [1, x, 1], "mean": [0] * 3}, r"meta.json: std=\[1, .* is not a")
      for x in (0, -1, 1e-300, np.nan, np.inf, 1e308, "1", True, None)
    ),
    *(
      ({"mean": [x, 1], "std": [1] * 3}, r"meta.json: mean=\[.* is not a list")
      for x in (np.nan, np.inf, -np.inf, 1e308, 10**400, "1", False, [1])
    ),
    *(
      ({"scale": x}, "meta.json: scale=.* is not a positive number")
      for x in (0, -1, np.nan, np.inf, 10**400, 1e-300, "255", True, [255])
    ),
    *(
      ({"pad": x}, "meta.json: pad=.* is not a whole number")
      for x in (0.9, np.inf, "wide", True, None)
    ),
    *(
      ({"flip": x}, "meta.json: flip=.* is not true or false")
      for x in ("no", 1, None)
    ),
  ],
)
def test_faults_of_meta(tmp_path, meta, message):
  told = one_line(message, save(tmp_path, small(), **meta))
  assert len(told) < 500


@pytest.mark.parametrize(
  "text", ["{", "", "[]", '[["pad", 1]]', "null", "[" * 100_000, "\udcff", None]
)
def test_a_meta_that_is_none(tmp_path, text):
  name = save(tmp_path, small())
  path = tmp_path / "meta.json"
  if text is None:
    path.mkdir()
  else:
    path.write_text(text, errors="surrogateescape")
  one_line(f"{path} (cannot be read|holds no fields).*; write for ins", name)


def test_a_label_of_many_holes_takes_no_memory(tmp_path):
  arrays = edit("train_labels", lambda y: y + (np.arange(12) == 4) * 2**24)
  name = save(tmp_path, arrays)
  tracemalloc.start()
  try:
    one_line("lack 3, 4, 5, 6, 7, 8, 9, 10 and 16777206 more of the ids", name)
    # A number for each id would be 134 million bytes.
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy"])
def test_any_flipped_byte_of_a_header(tmp_path, file):
  """The array is another one, or one line says what is wrong."""
  name, path = save(tmp_path, small()), tmp_path / file
  sound, kinds = path.read_bytes(), set()
  assert sound[127] == ord("\n") != sound[128]
  for place in range(128):
    for bit in 1, 2, 4, 8, 16, 32, 64, 128, 255:
      damaged = bytearray(sound)
      damaged[place] ^= bit
      path.write_bytes(damaged)
      try:
        sources.read_array(path)
      except ValueError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"{path} is no plain array (")
        kinds.add(type(error.__cause__).__name__)
  assert {"ValueError", "TokenError"} <= kinds
  path.write_bytes(sound[:8] + b"\0" + sound[9:])
  one_line(f"{file} is no plain array .*; save numbers with numpy.save", name)


@pytest.mark.parametrize(
  "folder, told",
  [
    ("x" * 300, "there is no such folder"),
    ("a\0b", "there is no such folder"),
    ("~nosuchuser/x", "nobody here has the home that it names; write the"),
  ],
)
def test_folders_that_cannot_be(folder, told):
  assert told in one_line("^data.name='arrays:", f"arrays:{folder}")
  if folder[0] == "~":
    pytest.importorskip("tensorflow_datasets")
    one_line("^data.folder='~nosuchuser/x': nobody", "tfds:a", folder=folder)


def test_faults_of_a_folder(tmp_path):
  one_line("there is no such folder", f"arrays:{tmp_path / 'none'}")
  name = save(tmp_path, small())
  (tmp_path / "test_labels.npy").write_bytes(b"text")
  one_line("test_labels.npy is no plain array", name)
  (tmp_path / "test_labels.npy").unlink()
  one_line("has no test_labels.npy; save it there with numpy.save", name)


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("cifar100", "did you mean tfds:cifar100"),
    ("Digit", "did you mean digits"),
    ("arrays:", "did you mean arrays:FOLDER"),
    ("tfds", "did you mean tfds:NAME"),
    ("", "use digits, arrays:FOLDER or tfds:NAME$"),
  ],
)
def test_an_unknown_set_names_the_nearest(name, hint):
  message = one_line(f"data.name='{name}' is unknown", name)
  assert hint.rstrip("$") in message


def test_limit_must_be_positive():
  one_line("limit=0 leaves no image; use 1 or more", "digits", limit=0)


# Fingerprint


def test_the_fingerprint_is_of_the_data_alone(tmp_path):
  plain = data.load(save(tmp_path, small()))
  again = plain._replace(name="other", train_images=np.array(plain[1]))
  assert data.fingerprint(plain) == data.fingerprint(again)
  assert len(data.fingerprint(plain)) == 64
  for name in small():
    changed = np.array(getattr(plain, name))
    changed.ravel()[-1] ^= 1
    other = plain._replace(**{name: changed})
    assert data.fingerprint(other) != data.fingerprint(plain)
  turned = plain._replace(train_images=plain.train_images.reshape(12, 4, 5, 3))
  assert data.fingerprint(turned) != data.fingerprint(plain)


# TFDS


@pytest.fixture(scope="module")
def library():
  return pytest.importorskip("tensorflow_datasets")


def drawn(split, n=40, height=6, width=5):
  draw = np.random.default_rng(len(split))
  return draw.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
  """Prepares small sets with TFDS itself, without network or TensorFlow."""
  from PIL import Image

  root = tmp_path_factory.mktemp("tfds")

  def prepare(name, splits, shape=(6, 5, 3), sizes=lambda i: (6, 5)):
    def info(self):
      features = library.features.FeaturesDict(
        {
          "image": library.features.Image(shape=shape),
          "label": library.features.ClassLabel(num_classes=4),
          "note": library.features.Text(),
        }
      )
      return library.core.DatasetInfo(builder=self, features=features)

    def examples(self, split):
      for i, image in enumerate(drawn(split)):
        height, width = sizes(i)
        picture = Image.fromarray(image[:height, :width])
        yield i, {"image": picture, "label": i % 4, "note": f"{i}"}

    builder = type(
      name,
      (library.core.GeneratorBasedBuilder,),
      {
        "VERSION": library.core.Version("1.0.0"),
        "__module__": __name__,
        "pkg_dir_path": root,
        "_info": info,
        "_split_generators": lambda self, _: {
          split: examples(self, split) for split in splits
        },
        "_generate_examples": examples,
      },
    )
    builder(data_dir=root, file_format="array_record").download_and_prepare(
      download_config=library.download.DownloadConfig(try_download_gcs=False)
    )

  prepare("TinyShapes", ("train", "test"))
  prepare("TinyMixed", ("train", "validation"), (None, None, 3), ragged)
  prepare("TinyTrain", ("train",))
  return root


def ragged(row):
  return (5 if row == 9 else 6), 5


def by_image(images, labels):
  """Sorted pairs: TFDS shuffles, so only the set of them can be compared."""
  return sorted(
    (np.asarray(x).tobytes(), int(y)) for x, y in zip(images, labels)
  )


@pytest.mark.parametrize("name", ["tfds:tiny_shapes", "tfds:tiny_shapes:1.0.0"])
def test_a_prepared_set(folder, name):
  got = data.load(name, folder=str(folder))
  assert got.name == name and got.classes == 4
  assert got.train_images.shape == got.test_images.shape == (40, 6, 5, 3)
  assert type(got.train_images) is np.ndarray
  assert got.train_images.dtype == np.uint8
  labels = np.arange(40) % 4
  for split in ("train", "test"):
    pairs = getattr(got, f"{split}_images"), getattr(got, f"{split}_labels")
    assert by_image(*pairs) == by_image(drawn(split), labels)
  # No known normalisation: that of the training images, no augmentation.
  mean = (drawn("train") / 255).mean((0, 1, 2))
  np.testing.assert_allclose(got.mean, mean, rtol=1e-12)
  assert (got.pad, got.flip) == (0, False)


def test_a_streamed_set_gives_the_same_batches(folder, monkeypatch):
  held = data.load("tfds:tiny_shapes", folder=str(folder))
  streamed = data.load("tfds:tiny_shapes", folder=str(folder), stream=True)
  assert not isinstance(streamed.train_images, np.ndarray)
  assert streamed.train_images.shape == held.train_images.shape
  assert data.fingerprint(streamed) == data.fingerprint(held)
  monkeypatch.setattr(data, "SAMPLED", 7)
  again = [
    data.load("tfds:tiny_shapes", folder=str(folder), stream=stream)
    for stream in (True, False)
  ]
  # Of seven images either way: a streamed run must see the same pixels.
  assert again[0].mean == again[1].mean != held.mean
  assert again[0].std == again[1].std != held.std
  assert data.fingerprint(streamed) != data.fingerprint(held)
  rows = pipeline.epoch_order(
    np.flatnonzero(held.train_labels < 2), seed=1, task=0, epoch=0, batch=16
  )
  read = pipeline.ahead(lambda i: streamed.train_images[rows[i]], range(2))
  for part, images in zip(rows, read, strict=True):
    np.testing.assert_array_equal(images, held.train_images[part])


def test_a_streamed_set_is_indexed_like_an_array(folder):
  arguments = {"folder": str(folder), "limit": 3}
  held = data.load("tfds:tiny_shapes", **arguments).test_images
  streamed = data.load("tfds:tiny_shapes", stream=True, **arguments).test_images
  assert len(held) == len(streamed) == 12
  mask = np.arange(12) % 3 == 1
  none = np.array([], int)
  for rows in (4, -1, slice(2, 9, 3), np.array([5, 5, 0]), mask, none):
    np.testing.assert_array_equal(held[rows], streamed[rows])


def test_limit_of_a_prepared_set(folder):
  got = data.load("tfds:tiny_shapes", folder=str(folder), limit=3)
  assert np.bincount(got.train_labels).tolist() == [3, 3, 3, 3]


def test_a_missing_feature_names_those_there_are(folder):
  where = {"folder": str(folder)}
  name = "tfds:tiny_shapes"
  has = "it has image, label, note"
  one_line(f"image='picture'; {has}", name, image="picture", **where)
  one_line(f"label='coarse'; {has}", name, label="coarse", **where)
  one_line("image='label' has shape", name, image="label", **where)
  one_line("label='image' has shape", name, label="image", **where)
  one_line("test_labels is|train_labels is", name, label="note", **where)


def test_faults_of_prepared_sets(folder):
  where = {"folder": str(folder)}
  one_line("image .* has shape .*resize all", "tfds:tiny_mixed", **where)
  one_line("has the splits train, but", "tfds:tiny_train", **where)
  one_line("did you mean tfds:tiny_shapes", "tfds:tiny_shape", **where)
  one_line("data.name='tfds:tiny_shapes:7", "tfds:tiny_shapes:7.0.0", **where)
  one_line("data.name='tfds:a b'", "tfds:a b", **where)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  message = one_line(
    "'tfds:cifar100' is not prepared in folder=",
    "tfds:cifar100",
    folder=str(tmp_path / "none"),
  )
  command = message.split('python -c "')[1].split('"')[0]
  assert f"tfds.builder('cifar100', data_dir='{tmp_path / 'none'}', " in command
  assert command.endswith(".download_and_prepare()")
  # All but the last call, which needs the network.
  exec(command.removesuffix(".download_and_prepare()"), {})
  assert not (tmp_path / "none").exists()


def test_a_set_without_random_access(folder, tmp_path):
  shutil.copytree(folder / "tiny_shapes", tmp_path / "tiny_shapes")
  path = tmp_path / "tiny_shapes" / "1.0.0" / "dataset_info.json"
  info = json.loads(path.read_text())
  info["fileFormat"] = "tfrecord"
  path.write_text(json.dumps(info))
  one_line(
    "is prepared as tfrecord, .*NEW_FOLDER",
    "tfds:tiny_shapes",
    folder=str(tmp_path),
  )


@pytest.mark.parametrize("name", ["tensorflow_datasets", "array_record", "PIL"])
def test_the_extra_is_asked_for(monkeypatch, name):
  for module in list(sys.modules):
    if module.split(".")[0] == name:
      monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, name, None)
  one_line(r"pip install 'mhil\[tfds\]'", "tfds:cifar100")


# Real images


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "shape", "pad"),
  [("fashion_mnist", (28, 28, 1), 2), ("cifar100", (32, 32, 3), 4)],
)
def test_real_images(name, shape, pad, tmp_path, monkeypatch):
  if not SHARED.is_dir():
    pytest.skip("the packed image sets are not beside the repository")
  pytest.importorskip("tensorflow_datasets")
  monkeypatch.syspath_prepend(str(SHARED))
  packed = __import__("load")
  prepare = __import__("prepare_tfds")
  whole = packed.load

  def part(*args, **kwargs):
    images, labels = whole(*args, **kwargs)
    return images[:6000], labels[:6000]

  monkeypatch.setattr(packed, "load", part)
  prepare.prepare(name, str(tmp_path))
  got = data.load(f"tfds:{name}", folder=str(tmp_path))
  for split in ("train", "test"):
    pairs = getattr(got, f"{split}_images"), getattr(got, f"{split}_labels")
    assert by_image(*pairs) == by_image(*part(name, split))
  assert got.train_images.shape[1:] == shape
  assert (got.pad, got.flip) == (pad, True)
  # An image's mean varies by about 0.2: 6000 of them give 0.003.
  scaled = got.train_images / 255
  np.testing.assert_allclose(scaled.mean((0, 1, 2)), got.mean, atol=1e-2)
  np.testing.assert_allclose(scaled.std((0, 1, 2)), got.std, atol=1e-2)
