"""Linear probes: what they find, and what they must not."""

import json

import numpy as np
import pytest

from experiments import cli
from experiments import probe as program
from mhil import probe


def blobs(n, noise, seed=0, classes=3, f=5):
  rng = np.random.default_rng(1)
  centre = rng.normal(0, 1, (classes, f))
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % classes
  return centre[labels] + rng.normal(0, noise, (n, f)), labels


def test_what_is_there_is_found():
  found = probe.accuracy(*blobs(90, 0.05), *blobs(60, 0.05, seed=2))
  assert found == 1.0


def test_what_is_not_there_is_not_found():
  train, labels = blobs(600, 0.05)
  mixed = np.random.default_rng(3).permutation(labels)
  found = probe.accuracy(train, mixed, *blobs(600, 0.05, seed=2))
  # Chance is a third. All rows of a class are alike, so 3 guesses decide: a
  # guess is right for one class in three.
  assert found <= 2 / 3
  noise = np.random.default_rng(4).normal(0, 1, (600, 5))
  found = probe.accuracy(noise, labels, noise[::-1], labels)
  assert abs(found - 1 / 3) < 0.1


def test_more_noise_leaves_less():
  found = [
    probe.accuracy(*blobs(300, noise), *blobs(300, noise, seed=2))
    for noise in (0.1, 1.0, 3.0)
  ]
  assert found[0] > found[1] > found[2]


def test_scale_and_dead_features_do_not_matter():
  (train, labels), (test, wanted) = blobs(90, 0.7), blobs(60, 0.7, seed=2)
  plain = probe.accuracy(train, labels, test, wanted)
  train, test = (
    np.concatenate([1e3 * x + 7, np.ones((len(x), 2))], 1)
    for x in (train, test)
  )
  assert probe.accuracy(train, labels, test, wanted) == plain


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(cli.UserError, match="holds no run; name another"):
    program.of_run(tmp_path)


def test_a_run_of_another_kind_is_named(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"mesh": {"head": 5}}))
  with pytest.raises(cli.UserError, match=r"objective\.name=end_to_end"):
    program.of_run(tmp_path)


def test_a_configuration_comes_back_as_it_was(tmp_path):
  from mhil import config as config_lib

  path = tmp_path / "config.json"
  want = config_lib.Config(local=config_lib.Local(cuts=(1, 2), mode="E"))
  path.write_text(config_lib.to_json(want))
  assert program.read_config(path) == want
