"""Where the images of `mhil.data` come from, as they are stored.

Every reader returns `(images, labels)` of the training and the test split,
and what is known of normalisation and augmentation.
"""

import difflib
import pathlib
import tokenize
import warnings
from typing import Any

import numpy as np
import tqdm

from mhil import settings

Part = tuple[Any, np.ndarray]
# What numpy raises for the header of a file that is damaged.
DAMAGE = (
  *(ValueError, TypeError, EOFError, SyntaxError, OverflowError),
  *(MemoryError, RecursionError, tokenize.TokenError),
)

# Mean and deviation of the training pixels, and the augmentation in use.
KNOWN: dict[str, dict[str, Any]] = {
  "cifar10": {
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "pad": 4,
    "flip": True,
  },
  "cifar100": {
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "pad": 4,
    "flip": True,
  },
  "fashion_mnist": {
    "mean": (0.2860,),
    "std": (0.3530,),
    "pad": 2,
    "flip": True,
  },
  "mnist": {"mean": (0.1307,), "std": (0.3081,), "pad": 2},
  "svhn_cropped": {
    "mean": (0.4377, 0.4438, 0.4728),
    "std": (0.1980, 0.2010, 0.1970),
    "pad": 4,
  },
}


def digits() -> tuple[list[Part], dict[str, Any]]:
  """Returns scikit-learn's digits, 1,437 to train on and 360 to test."""
  from sklearn import datasets  # Two seconds, for this set alone.

  stored = datasets.load_digits()
  images = stored.images.astype(np.uint8)[..., None]
  labels = stored.target.astype(np.int32)
  # Every fifth of the shuffled rows in order of their class: stratified.
  shuffled = np.argsort(np.random.Philox(key=0).random_raw(len(labels)))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  test = np.zeros(len(labels), bool)
  test[by_class[::5]] = True
  parts = [(images[~test], labels[~test]), (images[test], labels[test])]
  return parts, {"scale": 16.0}


def arrays(folder: str) -> tuple[list[Part], dict[str, Any]]:
  """Returns the mapped arrays of a folder, and its meta.json if it has one."""
  path = _expanded(f"data.name='arrays:{folder}'", folder)
  if not _is_folder(path):
    raise ValueError(
      f"data.name='arrays:{folder}': there is no such folder; make it and save "
      "train_images.npy, train_labels.npy, test_images.npy, test_labels.npy"
    )
  parts = [
    (_array(path, f"{split}_images.npy"), _array(path, f"{split}_labels.npy"))
    for split in ("train", "test")
  ]
  meta = path / "meta.json"
  return parts, settings.read(meta) if meta.exists() else {}


def read_array(path: pathlib.Path) -> np.ndarray:
  """Returns the array of a file of numpy.save, mapped and not read.

  Args:
    path: of the file.

  Raises:
    ValueError: one line, for what cannot be read or is no array of numbers.
  """
  try:
    with warnings.catch_warnings():
      # A damaged header may look like one of Python 2.
      warnings.simplefilter("ignore")
      return np.lib.format.open_memmap(path, mode="r")
  except (*DAMAGE, OSError) as error:
    told = getattr(error, "strerror", None) or _line(error)
    raise ValueError(
      f"{path} is no plain array ({told}); save numbers with "
      "numpy.save, objects are refused since reading them runs code"
    ) from error


def tfds(
  name: str, folder: str | None, image: str, label: str
) -> tuple[list[Part], dict[str, Any]]:
  """Returns a prepared TFDS set; the images decode when they are indexed."""
  library = _tfds()
  if folder is not None:
    folder = str(_expanded(f"data.folder={folder!r}", folder))
  builder = _builder(library, name, folder)
  keys = {"image": (image, 3), "label": (label, 0)}
  for argument, (key, rank) in keys.items():
    _check_feature(name, builder.info.features, argument, key, rank)
  parts = []
  for split in _splits(name, builder):
    try:
      records = builder.as_data_source(
        split,
        deserialize_method=library.decode.DeserializeMethod.RAW_BYTES,
      )
    except NotImplementedError as error:
      raise ValueError(
        f"data.name='tfds:{name}' is prepared as "
        f"{builder.info.file_format.value}, which has no random access; "
        "prepare it in another folder with " + _command(name, "NEW_FOLDER")
      ) from error
    # A feature alone parses several times faster than the whole example.
    images, labels = (
      Column(
        records,
        library.features.FeaturesDict({key: builder.info.features[key]}),
        key,
      )
      for key in (image, label)
    )
    parts.append((images, labels[:]))
  return parts, KNOWN.get(name.split(":")[0].split("/")[0], {})


class Column:
  """One feature of a TFDS split, decoded when indexed, like an array."""

  def __init__(
    self, records: Any, features: Any, key: str, rows: np.ndarray | None = None
  ):
    """Reads the first value, for shape and dtype."""
    self._records, self._features, self._key = records, features, key
    self._rows = np.arange(len(records)) if rows is None else rows
    first = self[0]
    self.shape, self.dtype = (len(self), *first.shape), first.dtype
    self.ndim = len(self.shape)

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._rows)

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Returns the decoded rows: an index, a slice, indices or a mask."""
    chosen = self._rows[rows]
    if np.ndim(chosen) == 0:
      return self._decode(np.array([chosen]))[0]
    result = np.empty((len(chosen), *self.shape[1:]), self.dtype)
    starts = range(0, len(chosen), 1024)
    quiet = True if len(chosen) < 20_000 else None  # None: no terminal.
    for start in tqdm.tqdm(starts, f"decoding {self._key}", disable=quiet):
      part = chosen[start : start + 1024]
      for offset, value in enumerate(self._decode(part)):
        if value.shape != self.shape[1:]:
          raise ValueError(
            f"{self._key} {part[offset]} has shape {list(value.shape)}, "
            f"{self._key} {self._rows[0]} {list(self.shape[1:])}; resize all "
            "images to one size and save them as arrays:FOLDER"
          )
        result[start + offset] = value
    return result

  def select(self, rows: Any) -> "Column":
    """Returns these rows, undecoded."""
    return Column(self._records, self._features, self._key, self._rows[rows])

  def _decode(self, rows: np.ndarray) -> list[np.ndarray]:
    records = self._records.__getitems__(rows.tolist())
    return [
      np.asarray(self._features.deserialize_example_np(record)[self._key])
      for record in records
    ]


def _array(folder: pathlib.Path, file: str) -> np.ndarray:
  if not (folder / file).is_file():
    raise ValueError(f"{folder} has no {file}; save it there with numpy.save")
  return read_array(folder / file)


def _expanded(told: str, folder: str) -> pathlib.Path:
  try:
    return pathlib.Path(folder).expanduser()
  except RuntimeError:
    raise ValueError(
      f"{told}: nobody here has the home that it names; write the whole path"
    ) from None


def _is_folder(path: pathlib.Path) -> bool:
  try:
    return path.is_dir()
  except OSError:
    return False  # A name may be longer than any can be.


def _tfds() -> Any:
  try:
    import array_record.python.array_record_data_source  # noqa: F401
    import PIL.Image  # noqa: F401
    import tensorflow_datasets
  except ImportError as error:
    raise ValueError(
      f"data.name='tfds:...' needs a package that is missing ({_line(error)}); "
      "install it with pip install 'mhil[tfds]'"
    ) from error
  return tensorflow_datasets


def _builder(library: Any, name: str, folder: str | None) -> Any:
  try:
    builder = library.builder(name, data_dir=folder)
  except library.core.DatasetNotFoundError as error:
    stem = name.split(":")[0].split("/")[0]
    known = library.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean tfds:{close[0]}, or" if close else "use its name, or"
    raise ValueError(
      f"data.name='tfds:{name}': TFDS knows no such set and folder={folder!r} "
      f"holds none; {hint} is folder= wrong?"
    ) from error
  except (ValueError, AssertionError) as error:
    raise ValueError(f"data.name='tfds:{name}': {_line(error)}") from error
  if not builder.is_prepared():
    where = f"folder={folder!r}"
    if folder is None:
      where = "TFDS's own folder (data.folder names another)"
    elif not pathlib.Path(folder).is_dir():
      where += ", which does not exist"
    raise ValueError(
      f"data.name='tfds:{name}' is not prepared in {where}; run "
      f"{_command(name, folder)} (TFDS may ask for pip install "
      "tensorflow-cpu to prepare, reading needs none)"
    )
  return builder


def _command(name: str, folder: str | None) -> str:
  where = "" if folder is None else f"data_dir={folder!r}, "
  return (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({name!r}, {where}file_format='array_record')"
    '.download_and_prepare()"'
  )


def _splits(name: str, builder: Any) -> tuple[str, str]:
  present = list(builder.info.splits)
  for test in ("test", "validation"):
    if "train" in present and test in present:
      return "train", test
  raise ValueError(
    f"data.name='tfds:{name}' has the splits {', '.join(present)}, but train "
    "and test or validation are needed; save your own split as arrays:FOLDER"
  )


def _check_feature(
  name: str, features: Any, argument: str, key: str, rank: int
) -> None:
  if key not in features:
    raise ValueError(
      f"data.name='tfds:{name}' has no feature {argument}={key!r}; it has "
      f"{', '.join(sorted(features))}"
    )
  shape = features[key].shape
  if not isinstance(shape, tuple) or len(shape) != rank:
    raise ValueError(
      f"data.name='tfds:{name}': feature {argument}={key!r} has shape {shape}, "
      f"but {rank} axes are needed; the features are "
      f"{', '.join(sorted(features))}"
    )


def _line(error: Exception) -> str:
  return " ".join(str(error).split())
