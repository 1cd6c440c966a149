"""The examples for job arrays, as far as they go without a cluster."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from tests import program

SCRIPT = program.ROOT / "docs" / "jobs" / "head.sh"
JOB = yaml.safe_load((SCRIPT.parent / "heads.yaml").read_text())


def start(folder, number, *flags, variable="SLURM_ARRAY_TASK_ID"):
  env = program.environment(folder / "cache") | {"RUNS": str(folder / "heads")}
  env |= {"PYTHON": sys.executable} | ({variable: number} if number else {})
  return subprocess.Popen(
    [str(SCRIPT), *flags],
    cwd=program.ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_job_without_a_number_says_so(tmp_path):
  job = start(tmp_path, None)
  _, err = job.communicate()
  assert job.returncode and "no number of a job array" in err
  assert not (tmp_path / "heads").exists()


@pytest.mark.slow
def test_a_job_trains_its_head_and_goes_on_when_it_is_started_again(tmp_path):
  flags = program.tiny_flags(program.save_arrays(tmp_path / "data"))
  folder = tmp_path / "heads" / "3"
  # Long enough that it is still at work when it is told to stop.
  flags.append("--config.train.epochs=30")
  job = start(tmp_path, "3", *flags)
  while not program.saves(folder) and job.poll() is None:
    time.sleep(0.05)
  job.terminate()
  out, err = job.communicate(timeout=120)
  assert job.returncode == 75, (out, err)
  assert "stopped by a signal; saved at step" in out
  assert not (folder / "metrics.json").exists()
  again = start(tmp_path, "3", *flags, variable="JOB_COMPLETION_INDEX")
  out, err = again.communicate(timeout=120)
  assert again.returncode == 0, (out, err)
  numbers = json.loads((folder / "metrics.json").read_text())
  assert numbers["heads"] == [3] and numbers["steps"] == 10 * program.STEPS


def test_the_kubernetes_job_is_indexed_and_runs_the_script():
  spec = JOB["spec"]
  assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
  assert spec["completionMode"] == "Indexed"
  pod = spec["template"]["spec"]
  assert pod["restartPolicy"] == "OnFailure"
  (container,) = pod["containers"]
  script, config = container["command"]
  assert program.ROOT / script == SCRIPT and os.access(SCRIPT, os.X_OK)
  assert (program.ROOT / config.removeprefix("--config=")).is_file()
  mounts = {mount["name"] for mount in container["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]}
  runs = {pair["name"]: pair["value"] for pair in container["env"]}["RUNS"]
  assert runs.startswith(container["volumeMounts"][0]["mountPath"])


def test_what_the_script_says_to_run_is_there():
  text = SCRIPT.read_text()
  for module in re.findall(r"python -m (experiments\.\w+)", text):
    assert (program.ROOT / f"{module.replace('.', '/')}.py").is_file()
